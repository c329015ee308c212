"""Option groups that commands share: a model, how it is sampled, and its acceleration."""

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
"""`--fail-if`, which may be given several times."""
Format = Literal["human", "json"]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Sampling):
    """Arguments of the pipeline call; default: those of the pipeline."""

    def __post_init__(self) -> None:
        pass  # checked when the command runs, whose errors are one line


@dataclass(kw_only=True)
class ModelOptions:
    """The model, how it is sampled, and where results go."""

    model: str = EMBEDDED
    """Repository of Wan2.1 or 2.2, Stable Diffusion 3, Lumina-Next or Lumina-Image 2.0: hub id or folder;
    "tiny-wan", "tiny-sd3" and "tiny-lumina2" are the embedded demo models."""
    sampling: OmitArgPrefixes[SamplingOptions] = field(default_factory=SamplingOptions)
    seed: int = 0
    """Seed of the first sample, in [0, 2**63); later samples count up from it."""
    output_dir: Path = Path("outputs")
    """Folder for results; created when there is something to write."""
    fps: float = 16.0
    """Frames per second of written clips."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    dtype: Dtype = "auto"
    """auto is bf16 on a GPU and fp32 on a CPU."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository."""
    cpu_offload: bool = False
    """Keep on the GPU only the part that works (enable_model_cpu_offload)."""
    format: Format = "human"
    """How the result is printed on stdout."""

    @property
    def hub(self) -> dict[str, Any]:
        """Arguments for the hub."""
        return {} if self.revision is None else {"revision": self.revision}

    def resolve(self) -> tuple[str | os.PathLike, Sampling]:
        """Return where the model is, and checked sampling arguments with the defaults of embedded models."""
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
        """Check everything that can be checked before the model is loaded.

        Args:
            prompts: the prompts, whose sizes replace those of the options.
            samples: number of samples. Default: one for each prompt.

        Returns:
            The outline of the pipeline (see `sampling.outline`), and the sampling arguments.

        Raises:
            ValueError: an option that this model or this machine does not accept.
        """
        source, sampling = self.resolve()
        check_fps(self.fps)
        check_seed(self.seed, max(1, len(prompts) if samples is None else samples))
        from dit_accel.sampling.devices import pick_device
        from dit_accel.sampling.outline import read_outline
        from dit_accel.sampling.picture import picture_size, read_picture

        pick_device(self.device)
        picture = None if sampling.image is None else read_picture(sampling.image)
        outline = read_outline(source, **self.hub)
        sized = sampling
        if (
            picture is not None
            and outline.takes_image
            and sampling.height is sampling.width is None
        ):
            sized = sampling.filled(picture_size(picture, outline))
        outline.check(sized)
        for record in prompts:
            outline.check(sized.overridden(**record.sampling_arguments()))
        check_output(self.output_dir, "output_dir")
        return outline, sized

    def load(self, sla: Any = None, ras: RASConfig | None = None) -> Any:
        """Load the pipeline; `check` comes first."""
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
        """Return further arguments of `from_pretrained`."""
        return {}


@dataclass(kw_only=True)
class AccelerationOptions(ModelOptions):
    """The same, and what accelerates it."""

    sla: str = "auto"
    """Sparse attention: quality, balanced, fast, few-step, a YAML file, a folder with sla.safetensors, or none;
    auto is the model's own sla.safetensors, and balanced without one."""
    ras: str = "none"
    """Region-adaptive sampling: quality, balanced, fast, forecast, partial, few-step, paper, a YAML file, or none."""
    topk: float | None = None
    """Overrides the share of key blocks that is read exactly, in (0, 1]; not with sla.safetensors."""
    crossover: Literal["auto", "never"] | None = None
    """Overrides crossover: auto = dense where sparse was measured to lose, never = always sparse."""
    compile: bool = False
    """Compile the repeated blocks of the transformer (torch.compile). The first call of each shape then takes longer."""
    quantize: str = "none"
    """Quantise the transformer's weights while they are loaded: torchao:int8, torchao:int8_dynamic (inputs of layers too)
    or torchao:float8 (pip install 'dit-accel[quant]')."""

    def check(
        self, prompts: Sequence[Any] = (), *, samples: int | None = None
    ) -> tuple[Any, Sampling]:
        """See `ModelOptions.check`."""
        from dit_accel.sampling.quantize import check_quantize

        check_quantize(self.quantize)
        outline, sampling = super().check(prompts, samples=samples)
        if self.compile:
            from dit_accel.sampling.extras import check_compile

            check_compile(outline, self.device)
        return outline, sampling

    def loading(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained` for quantised weights."""
        from dit_accel.sampling.quantize import loading_arguments

        return loading_arguments(self.quantize)

    def load_compiled(self) -> Any:
        """Load the pipeline, dense, and compile it if that is wanted; `check` comes first."""
        from dit_accel.sampling.extras import compile_blocks

        pipe = self.load()
        if self.compile:
            compile_blocks(pipe)
        return pipe

    def sla_config(self) -> Any:
        """Return the settings or checkpoint of sparse attention, overrides applied; None for dense."""
        source, _ = self.resolve()
        return sla_settings(self.sla, source, self.hub, topk=self.topk, crossover=self.crossover)

    def ras_config(self) -> RASConfig | None:
        """Return the settings of region-adaptive sampling; None for all tokens in each step."""
        return RASConfig.load(self.ras)


def sla_settings(
    sla: str,
    model: str | os.PathLike,
    hub: dict[str, Any],
    *,
    topk: float | None = None,
    crossover: Literal["auto", "never"] | None = None,
) -> Any:
    """Return what `--sla`, `--topk` and `--crossover` mean: an SLAConfig, an SLACheckpoint, or None for dense."""
    from dit_accel.checkpoint.file import settings_of

    overrides: dict[str, Any] = {"topk": topk, "crossover": crossover}
    overrides = {k: x for k, x in overrides.items() if x is not None}
    if sla == "none" and overrides:
        raise ValueError("sla='none': dense; accepted without topk and crossover")
    settings = _own_settings(model, hub) if sla == "auto" else settings_of(sla)
    if settings is None or not overrides:
        return settings
    if isinstance(settings, SLAConfig):
        return replace(settings, **overrides)
    if topk is not None:
        raise ValueError(
            f"topk={topk}: part of what the SLA checkpoint was trained for; accepted with a preset or a YAML file"
        )

    def overridden(x: Any) -> Any:
        return x and replace(x, config=replace(x.config, **overrides))

    if isinstance(settings, dict):  # by transformer
        return {name: overridden(x) for name, x in settings.items()}
    return overridden(settings)


def _own_settings(model: str | os.PathLike, hub: dict[str, Any]) -> Any:
    """Return the SLA checkpoint of the repository (of two transformers a dict), or the preset "balanced" where there is none."""
    from dit_accel.checkpoint.file import FILE_NAME, read_checkpoint
    from dit_accel.checkpoint.repository import read_index, transformers_in
    from dit_accel.checkpoint.save_load import own_settings

    names = transformers_in(read_index(model, "model", **hub))
    found = own_settings(model, FILE_NAME, "sla", names, read_checkpoint, **hub)
    return SLAConfig.load("balanced") if found is None else found


def check_output(folder: Path, argument: str) -> None:
    """Check that a folder can be written to; a folder that was not there is not left behind.

    Raises:
        ValueError: it cannot; the message names `argument`.
    """
    from dit_accel.files import check_writable

    new = [x for x in (folder, *folder.parents) if not os.path.exists(x)]
    try:
        check_writable(folder, argument)
    finally:
        for place in new:
            with contextlib.suppress(OSError):
                place.rmdir()
