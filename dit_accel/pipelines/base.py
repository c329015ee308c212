"""`SparsePipelineMixin`: base class of the sparse pipelines."""

import os
from pathlib import Path
from typing import Any, ClassVar

from diffusers import DiffusionPipeline
from diffusers.loaders.single_file import FromSingleFileMixin
from diffusers.loaders.single_file_model import FromOriginalModelMixin
from diffusers.loaders.single_file_utils import SCHEDULER_LEGACY_KWARGS

from dit_accel import control
from dit_accel.checkpoint.file import FILE_NAME, SLACheckpoint, read_checkpoint, write_checkpoint
from dit_accel.checkpoint.ras_file import RAS_FILE_NAME, read_ras, write_ras
from dit_accel.checkpoint.repository import read_index, transformers_in
from dit_accel.checkpoint.save_load import (
    checkpoint_of,
    own_settings,
    part_folders,
    weights_left_out,
)
from dit_accel.config import RASConfig, SLAConfig
from dit_accel.files import check_writable, model_source
from dit_accel.pipelines.accelerate import accelerate
from dit_accel.pipelines.arguments import (
    DEFAULT,
    Settings,
    check_keywords,
    read_settings,
    with_dtypes,
)
from dit_accel.runtime.components import TRANSFORMERS, parts_of, split
from dit_accel.runtime.install import method_of

SLAInput = SLAConfig | SLACheckpoint | dict | str | os.PathLike | None
RASInput = RASConfig | dict | str | os.PathLike | None
BALANCED: Settings = {"sla": SLAConfig.load("balanced")}
"""Methods that are on by default."""
# Arguments that decide which files DiffusionPipeline.load_config reads.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


class SparsePipelineMixin:
    """Loading and saving with settings of acceleration. Use as the first base: `class SparseX(SparsePipelineMixin, X)`.

    A subclass gets the `__name__` of its diffusers parent, because diffusers finds pipelines by that name in
    model_index.json and in `AutoPipelineFor*.from_pipe`. `__qualname__` is unchanged.
    """

    _parent: ClassVar[str]
    """Class name of the diffusers parent, as in model_index.json."""
    _aliases: ClassVar[tuple[str, ...]] = ()
    """Older class names of the parent, which repositories may have."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__name__ = cls._parent

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        sla: SLAInput = DEFAULT,
        ras: RASInput = DEFAULT,
        **kwargs: Any,
    ) -> Any:
        """Load a diffusers repository and accelerate it.

        Args:
            pretrained_model_name_or_path: hub id, folder, or an embedded model ("tiny-wan", "tiny-sd3",
                "tiny-lumina2").
            sla: sparse attention: a preset ("quality", "balanced", "fast", "few-step"), a YAML file, an `SLAConfig`, a dict
                of its fields, or a folder or file that `save_sla` or fine-tuning wrote; None or "none" for dense
                attention. Also a dict of these by transformer, `{"transformer": "balanced", "transformer_2": None}`.
                Default: the `sla.safetensors` of the repository, or "balanced" if there is none.
            ras: region-adaptive sampling: a preset ("quality", "balanced", "fast", "forecast", "partial", "few-step", "paper"), a
                YAML file, an `RASConfig`, or a dict of its fields; None or "none" for dense steps. Also a dict of
                these by transformer. Default: the `ras.json` of the repository, or off if there is none.
            **kwargs: all arguments of the diffusers parent. `dtype` may also be a name: "fp32", "bf16", "fp16",
                "float32", "bfloat16" or "float16".

        Raises:
            ValueError: an argument is unknown or not accepted, or the repository is of another pipeline class; raised
                before weights are read. Or the transformer cannot be accelerated.
        """
        settings = read_settings(sla, ras)
        if kwargs.get("custom_pipeline") is None:
            check_keywords(cls, kwargs, DiffusionPipeline.from_pretrained)
        kwargs = with_dtypes(kwargs)
        source = model_source(pretrained_model_name_or_path)
        hub = {k: kwargs[k] for k in _HUB_ARGUMENTS if k in kwargs}
        index = cls._read_index(source, hub)
        given = {k: kwargs[k] for k in TRANSFORMERS if k in kwargs}
        for method, chosen in settings.items():
            split(method, chosen, transformers_in(index, given))
        hub.pop("proxies", None)  # an argument of diffusers, but not of huggingface_hub
        own, names = BALANCED.copy(), transformers_in(index)
        for method, file_name, read in (
            ("sla", FILE_NAME, read_checkpoint),
            ("ras", RAS_FILE_NAME, read_ras),
        ):
            chosen = split(method, settings[method], TRANSFORMERS) if method in settings else {}
            if not chosen.keys() >= set(names):
                found = own_settings(source, file_name, method, names, read, **hub)
                own |= {} if found is None else {method: found}
        pipe = super().from_pretrained(source, **kwargs)  # type: ignore[misc]
        return accelerate(pipe, settings, own)

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike,
        *,
        sla: SLAInput = DEFAULT,
        ras: RASInput = DEFAULT,
        **kwargs: Any,
    ) -> Any:
        """Load a single file of weights in the original layout and accelerate the pipeline.

        Args:
            pretrained_model_link_or_path: path or hub link of a `.safetensors` or `.ckpt` file.
            sla: as in `from_pretrained`, but without a search for `sla.safetensors`. Default: "balanced".
            ras: as in `from_pretrained`, but without a search for `ras.json`. Default: off.
            **kwargs: all arguments of the diffusers parent; `dtype` as in `from_pretrained`.

        Raises:
            NotImplementedError: the diffusers parent has no `from_single_file` (Stable Diffusion 3 and FLUX.1 have).
            ValueError: an argument is unknown or not accepted, raised before weights are read; or the transformer
                cannot be accelerated.
        """
        if not issubclass(cls, FromSingleFileMixin):
            raise NotImplementedError(
                f"{cls.__qualname__}.from_single_file: diffusers does not support it for {cls._parent}; load the transformer "
                "with its own from_single_file, and pass it to from_pretrained as transformer="
            )
        settings = read_settings(sla, ras)
        loaders = (FromSingleFileMixin.from_single_file, FromOriginalModelMixin.from_single_file)
        check_keywords(cls, kwargs, *loaders, more=SCHEDULER_LEGACY_KWARGS)
        pipe = super().from_single_file(pretrained_model_link_or_path, **with_dtypes(kwargs))  # type: ignore[misc]
        return accelerate(pipe, settings, BALANCED)

    @classmethod
    def from_pipe(
        cls, pipeline: Any, *, sla: SLAInput = DEFAULT, ras: RASInput = DEFAULT, **kwargs: Any
    ) -> Any:
        """Make a sparse pipeline from a loaded pipeline. The components are shared, not copied.

        Shared components share their acceleration. If the transformer is accelerated already, new settings of a method
        replace its settings for both pipelines, and other methods are unchanged.

        Args:
            pipeline: a loaded diffusers pipeline of the same family.
            sla: as in `from_pretrained`. Default: unchanged, or "balanced" if nothing is on.
            ras: as in `from_pretrained`. Default: unchanged.
            **kwargs: all arguments of the diffusers parent. As in diffusers, `dtype` defaults to float32; pass the dtype
                of the components to keep it.

        Raises:
            ValueError: an argument is not accepted, or the transformer cannot be accelerated.
        """
        settings = read_settings(sla, ras)
        pipe = super().from_pipe(pipeline, **with_dtypes(kwargs))  # type: ignore[misc]
        return accelerate(pipe, settings, BALANCED)

    @classmethod
    def _read_index(cls, source: str | os.PathLike, hub: dict[str, Any]) -> dict[str, Any]:
        """Return the content of model_index.json. Refuse other pipeline classes."""
        index = read_index(source, **hub)
        found = index.get("_class_name")
        if found not in (cls._parent, *cls._aliases):
            raise ValueError(
                f"pretrained_model_name_or_path={str(source)!r}: holds a {found}; {cls.__qualname__} accepts a "
                f"{cls._parent} repository"
            )
        return index

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save the pipeline like diffusers, together with the settings of acceleration.

        `sla.safetensors` is written if sparse attention is on with settings other than the default, and `ras.json` if
        region-adaptive sampling is on. diffusers loads the saved repository as the plain model, and `from_pretrained` of
        this class loads the settings too. With two transformers, the files are in the sub-folder of each. Weights of an
        SLA checkpoint are saved as weights of the transformer.

        Raises:
            ValueError: the folder has a settings file of a method that is off, or sparse attention cannot be saved yet
                (see `save_sla`). Nothing is written then.
        """
        folder, parts = Path(save_directory), parts_of(self)
        places = part_folders(self, folder)
        on: dict[str, dict[str, Any]] = {
            name: {part: m.config for part, x in parts.items() if (m := method_of(x, name))}
            for name in ("sla", "ras")
        }
        for name, file_name, method in (
            ("sla", FILE_NAME, "sparse attention"),
            ("ras", RAS_FILE_NAME, "region-adaptive sampling"),
        ):
            for part, place in places.items():
                if part not in on[name] and (place / file_name).exists():
                    raise ValueError(
                        f"save_directory={str(save_directory)!r}: has {(place / file_name).relative_to(folder)}, but "
                        f"{method} is off; accepted is a folder without this file"
                    )
        # Written before diffusers saves, so that push_to_hub=True uploads these files too.
        sla, ras = on.values()
        default = len(sla) == len(parts) and all(x == SLAConfig() for x in sla.values())
        if sla and not (default and not any((x / FILE_NAME).exists() for x in places.values())):
            checkpoints = {part: checkpoint_of(parts[part], self) for part in sla}
            for part, checkpoint in checkpoints.items():
                path = check_writable(places[part], "save_directory") / FILE_NAME
                write_checkpoint(path, checkpoint)
        for part, config in ras.items():
            write_ras(check_writable(places[part], "save_directory") / RAS_FILE_NAME, config)
        with weights_left_out(self):
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def __repr__(self) -> str:
        """Return model_index.json under the name of this class."""
        return f"{type(self).__qualname__} {self.to_json_string()}"  # type: ignore[attr-defined]

    def enable(self, *, sla: SLAInput = None, ras: RASInput = None) -> None:
        """Enable acceleration, see `dit_accel.enable`."""
        control.enable(self, ras=ras, sla=sla)

    def disable(self) -> None:
        """Disable acceleration, see `dit_accel.disable`."""
        control.disable(self)

    def summary(self, *, strict: bool = False) -> control.Summary:
        """Return the summary of the last run, see `dit_accel.summary`."""
        return control.summary(self, strict=strict)
