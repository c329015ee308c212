"""Options that several commands share: model, sampling and acceleration."""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, UseAppendAction

from dit_accel.config import RASConfig, SLAConfig
from dit_accel.files import EMBEDDED_MODELS, model_source
from dit_accel.sampling.settings import Dtype, Sampling, check_fps, check_seed

EMBEDDED = "tiny-wan"
FailIf = Annotated[tuple[str, ...], UseAppendAction]
"""Type of the option `--fail-if`, which can be given several times."""
Format = Literal["human", "json"]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Sampling):
    """Arguments of the pipeline call. Default: the defaults of the pipeline."""

    def __post_init__(self) -> None:
        pass  # checked by `ModelOptions.resolve`, whose errors are printed as one line


@dataclass(kw_only=True)
class ModelOptions:
    """Options for the model, the sampling arguments and the output."""

    model: str = EMBEDDED
    """Hub id or folder of a diffusers repository, or one of the embedded models tiny-wan, tiny-sd3 and tiny-lumina2."""
    sampling: OmitArgPrefixes[SamplingOptions] = field(default_factory=SamplingOptions)
    seed: int = 0
    """Seed of the first sample, in [0, 2**63). Later samples count up from it."""
    output_dir: Path = Path("outputs")
    """Folder for the results. It is created when there is something to write."""
    fps: float = 16.0
    """Frame rate of written clips."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, ... auto is the GPU if there is one, else the CPU."""
    dtype: Dtype = "auto"
    """Dtype of the weights. auto is bf16 on a GPU and fp32 on a CPU."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    cpu_offload: bool = False
    """Keep only the component that is running on the GPU (enable_model_cpu_offload)."""
    format: Format = "human"
    """Format of the result on stdout."""

    @property
    def hub(self) -> dict[str, Any]:
        """Arguments of hub downloads."""
        return {} if self.revision is None else {"revision": self.revision}

    def resolve(self) -> tuple[str | os.PathLike, Sampling]:
        """Return the repository of the model, and the checked sampling arguments with the defaults of embedded models.

        Raises:
            ValueError: a sampling argument is invalid.
        """
        sampling = Sampling(**asdict(self.sampling))
        if self.model not in EMBEDDED_MODELS:
            return self.model, sampling
        from dit_accel import demo
        from dit_accel.sampling.outline import read_outline

        source = model_source(self.model)
        return source, sampling.filled(demo.default_sampling(read_outline(source)))

    def check(
        self, prompts: Sequence[Any] = (), *, samples: int | None = None
    ) -> tuple[Any, Sampling]:
        """Check the options before the model is loaded.

        Args:
            prompts: prompt records. Their sizes replace those of the options.
            samples: number of samples. Default: one for each prompt.

        Returns:
            The outline of the pipeline (see `sampling.outline`), and the sampling arguments.

        Raises:
            ValueError: an option is invalid, or the model or this machine does not support it.
        """
        source, sampling = self.resolve()
        check_fps(self.fps)
        check_seed(self.seed, max(1, len(prompts) if samples is None else samples))
        from dit_accel.sampling.devices import pick_device
        from dit_accel.sampling.input_image import read_input_image, size_for_image
        from dit_accel.sampling.outline import read_outline

        pick_device(self.device)
        image = None if sampling.image is None else read_input_image(sampling.image)
        outline = read_outline(source, **self.hub)
        sized = sampling
        if image is not None and outline.takes_image and sampling.height is sampling.width is None:
            sized = sampling.filled(size_for_image(image, outline))
        outline.check(sized)
        for record in prompts:
            outline.check(sized.overridden(**record.sampling_arguments()))
        check_output(self.output_dir, "output_dir")
        return outline, sized

    def load(self, sla: Any = None, ras: RASConfig | None = None) -> Any:
        """Load the pipeline. Call `check` first."""
        from dit_accel.sampling.load import load_pipeline

        return load_pipeline(
            self.resolve()[0],
            sla=sla,
            ras=ras,
            device=self.device,
            dtype=self.dtype,
            cpu_offload=self.cpu_offload,
            **self.hub,
            **self.loading(),
        )

    def loading(self) -> dict[str, Any]:
        """Return additional arguments of `from_pretrained`."""
        return {}


@dataclass(kw_only=True)
class AccelerationOptions(ModelOptions):
    """Options of `ModelOptions`, and options for the acceleration."""

    sla: str = "auto"
    """Sparse attention: quality, balanced, fast, few-step, a YAML file, a folder with sla.safetensors, or none.
    auto is the sla.safetensors of the model, or balanced if it has none."""
    ras: str = "none"
    """Region-adaptive sampling: quality, balanced, fast, forecast, partial, few-step, paper, a YAML file, or none."""
    topk: float | None = None
    """Fraction of key blocks that are read exactly, in (0, 1]. Overrides the setting of --sla; not with sla.safetensors."""
    crossover: Literal["auto", "never"] | None = None
    """auto: dense attention for sequences where sparse attention was measured to be slower. never: always sparse.
    Overrides the setting of --sla."""
    compile: bool = False
    """Compile the repeated blocks of the transformer (torch.compile). The first call with each shape takes longer."""
    quantize: str = "none"
    """Quantise the weights of the transformer while loading: torchao:int8, torchao:int8_dynamic (also layer inputs) or
    torchao:float8. Needs pip install 'dit-accel[quant]'."""

    def check(
        self, prompts: Sequence[Any] = (), *, samples: int | None = None
    ) -> tuple[Any, Sampling]:
        """Check the options before the model is loaded, see `ModelOptions.check`."""
        from dit_accel.sampling.quantize import check_quantize

        check_quantize(self.quantize)
        outline, sampling = super().check(prompts, samples=samples)
        if self.compile:
            from dit_accel.sampling.extras import check_compile

            check_compile(outline, self.device)
        return outline, sampling

    def loading(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained` that quantise the weights."""
        from dit_accel.sampling.quantize import loading_arguments

        return loading_arguments(self.quantize)

    def load_compiled(self) -> Any:
        """Load the pipeline without acceleration, and compile it if `compile` is set. Call `check` first."""
        from dit_accel.sampling.extras import compile_blocks

        pipe = self.load()
        if self.compile:
            compile_blocks(pipe)
        return pipe

    def sla_config(self) -> Any:
        """Return the settings or checkpoint of sparse attention with overrides applied, or None for dense attention."""
        source, _ = self.resolve()
        return sla_settings(self.sla, source, self.hub, topk=self.topk, crossover=self.crossover)

    def ras_config(self) -> RASConfig | None:
        """Return the settings of region-adaptive sampling, or None if it is off."""
        return RASConfig.load(self.ras)


def sla_settings(
    sla: str,
    model: str | os.PathLike,
    hub: dict[str, Any],
    *,
    topk: float | None = None,
    crossover: Literal["auto", "never"] | None = None,
) -> Any:
    """Return the settings of the options `--sla`, `--topk` and `--crossover`.

    Args:
        sla: value of `--sla`.
        model: folder or hub id of the model, for "auto".
        hub: arguments of hub downloads.
        topk, crossover: overrides. None: no override.

    Returns:
        An `SLAConfig`, an `SLACheckpoint`, a dict of them by transformer, or None for dense attention.

    Raises:
        ValueError: the settings are invalid, or the overrides do not fit them.
    """
    from dit_accel.checkpoint.file import settings_of

    overrides: dict[str, Any] = {"topk": topk, "crossover": crossover}
    overrides = {k: x for k, x in overrides.items() if x is not None}
    if sla == "none" and overrides:
        raise ValueError(f"sla='none': dense attention takes no {' and no '.join(overrides)}")
    settings = _own_settings(model, hub) if sla == "auto" else settings_of(sla)
    if settings is None or not overrides:
        return settings
    if isinstance(settings, SLAConfig):
        return replace(settings, **overrides)
    if topk is not None:
        raise ValueError(
            f"topk={topk}: the SLA checkpoint was trained for its own topk; topk needs a preset or a YAML file"
        )

    def overridden(x: Any) -> Any:
        return x and replace(x, config=replace(x.config, **overrides))

    if isinstance(settings, dict):  # by transformer
        return {name: overridden(x) for name, x in settings.items()}
    return overridden(settings)


def _own_settings(model: str | os.PathLike, hub: dict[str, Any]) -> Any:
    """Return the SLA checkpoint of the repository, a dict for two transformers, or the preset "balanced" if there is none."""
    from dit_accel.checkpoint.file import FILE_NAME, read_checkpoint
    from dit_accel.checkpoint.repository import read_index, transformers_in
    from dit_accel.checkpoint.save_load import own_settings

    names = transformers_in(read_index(model, "model", **hub))
    found = own_settings(model, FILE_NAME, "sla", names, read_checkpoint, **hub)
    return SLAConfig.load("balanced") if found is None else found


def check_output(folder: Path, argument: str) -> None:
    """Check that a folder can be written to. A folder that does not exist is not left behind.

    Args:
        folder: folder to check.
        argument: name of the argument, for the message.

    Raises:
        ValueError: the folder cannot be written to.
    """
    from dit_accel.files import check_writable

    new = [x for x in (folder, *folder.parents) if not os.path.exists(x)]
    try:
        check_writable(folder, argument)
    finally:
        for place in new:
            with contextlib.suppress(OSError):
                place.rmdir()
