"""`SparsePipelineMixin`: what every sparse pipeline adds to its diffusers parent."""

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
from dit_accel.checkpoint.repository import read_index
from dit_accel.checkpoint.save_load import checkpoint_of, own_file, weights_left_out
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
from dit_accel.runtime.install import method_of

SLAInput = SLAConfig | SLACheckpoint | dict | str | os.PathLike | None
RASInput = RASConfig | dict | str | os.PathLike | None
BALANCED: Settings = {"sla": SLAConfig.load("balanced")}
"""Methods that are on by default."""
# The arguments that decide which files DiffusionPipeline.load_config reads.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


class SparsePipelineMixin:
    """Base class that comes first: `class SparseX(SparsePipelineMixin, X)`.

    A subclass takes the `__name__` of its diffusers parent, because diffusers finds pipelines by that name:
    in model_index.json and in `AutoPipelineFor*.from_pipe`. `__qualname__` stays.
    """

    _parent: ClassVar[str]
    """Class name of the diffusers parent, as in model_index.json."""
    _aliases: ClassVar[tuple[str, ...]] = ()
    """Older names of the parent that repositories may have."""

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
                attention.
                Default: the `sla.safetensors` of the repository, and "balanced" without one.
            ras: region-adaptive sampling: a preset ("quality", "balanced", "fast", "forecast", "partial", "few-step", "paper"), a
                YAML file, an `RASConfig`, or a dict of its fields; None or "none" for dense steps. Default: the
                `ras.json` of the repository, and off without one.
            **kwargs: everything that the diffusers parent accepts. `dtype` may also be a name: "fp32",
                "bf16", "fp16", "float32", "bfloat16" or "float16".

        Raises:
            ValueError: a bad or unknown argument, or a repository of another pipeline class; before any weight
                is read. Or the transformer cannot be accelerated.
        """
        settings = read_settings(sla, ras)
        if kwargs.get("custom_pipeline") is None:
            check_keywords(cls, kwargs, DiffusionPipeline.from_pretrained)
        kwargs = with_dtypes(kwargs)
        source = model_source(pretrained_model_name_or_path)
        hub = {k: kwargs[k] for k in _HUB_ARGUMENTS if k in kwargs}
        cls._check_repository(source, kwargs, hub)
        hub.pop("proxies", None)  # diffusers takes them, huggingface_hub does not
        own = BALANCED.copy()
        if "sla" not in settings and (path := own_file(source, FILE_NAME, "sla", **hub)):
            own["sla"] = read_checkpoint(path)
        if "ras" not in settings and (path := own_file(source, RAS_FILE_NAME, "ras", **hub)):
            own["ras"] = read_ras(path)
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
        """Load one file of weights in the original layout and accelerate the pipeline.

        Args:
            pretrained_model_link_or_path: path or hub link of a `.safetensors` or `.ckpt` file.
            sla: as in `from_pretrained`, but files beside the weights are not looked for. Default: "balanced".
            ras: likewise. Default: off.
            **kwargs: everything that the diffusers parent accepts; `dtype` as in `from_pretrained`.

        Raises:
            NotImplementedError: the diffusers parent has no `from_single_file` (only Stable Diffusion 3 has).
            ValueError: a bad or unknown argument, before any weight is read; or the transformer cannot be
                accelerated.
        """
        if not issubclass(cls, FromSingleFileMixin):
            raise NotImplementedError(
                f"{cls.__qualname__}.from_single_file: {cls._parent} of diffusers has none; load the transformer with its "
                "own from_single_file, and pass it to from_pretrained as transformer="
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
        """Make a sparse pipeline from a loaded one. The components are shared, not copied.

        Shared components share their acceleration. If the transformer is accelerated already, settings that
        are given replace those of their method for both pipelines, and the other method stays.

        Args:
            pipeline: a loaded diffusers pipeline of the same family.
            sla: as in `from_pretrained`. Default: unchanged, or "balanced" if nothing is on.
            ras: as in `from_pretrained`. Default: unchanged.
            **kwargs: everything that the diffusers parent accepts. As in diffusers, `dtype` defaults to
                float32; pass the dtype that the components have to keep it.

        Raises:
            ValueError: a bad argument, or the transformer cannot be accelerated.
        """
        settings = read_settings(sla, ras)
        if getattr(pipeline, "transformer_2", None) is not None:
            raise ValueError("pipeline.transformer_2: Wan2.2 is not supported; accepted: None")
        pipe = super().from_pipe(pipeline, **with_dtypes(kwargs))  # type: ignore[misc]
        return accelerate(pipe, settings, BALANCED)

    @classmethod
    def _check_repository(
        cls, source: str | os.PathLike, kwargs: dict[str, Any], hub: dict[str, Any]
    ) -> None:
        name = f"pretrained_model_name_or_path={str(source)!r}"
        index = read_index(source, **hub)
        found = index.get("_class_name")
        if found not in (cls._parent, *cls._aliases):
            raise ValueError(
                f"{name}: holds a {found}; {cls.__qualname__} accepts a {cls._parent} repository"
            )
        second = index.get("transformer_2")
        if second is not None and second[0] is not None and "transformer_2" not in kwargs:
            raise ValueError(
                f"{name}: has a transformer_2 (Wan2.2), which is not supported; "
                "accepted are one-transformer repositories (Wan2.1)"
            )

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as diffusers does, with the settings of the methods that are on.

        `sla.safetensors` is written if sparse attention is on with other settings than the default, `ras.json` if
        region-adaptive sampling is on. Plain diffusers loads the repository as the plain model; `from_pretrained`
        of this class loads the settings too. Weights that an SLA checkpoint brought are saved as those of the
        transformer.

        Raises:
            ValueError: a method is off, and the folder holds its file, which would be loaded with what is saved
                now; or sparse attention cannot be saved yet (see `save_sla`). Nothing is written.
        """
        folder = Path(save_directory)
        sla, ras = (
            None if (method := method_of(self, name)) is None else method.config
            for name in ("sla", "ras")
        )
        for file_name, method, config in (
            (FILE_NAME, "sparse attention", sla),
            (RAS_FILE_NAME, "region-adaptive sampling", ras),
        ):
            if config is None and (folder / file_name).exists():
                raise ValueError(
                    f"save_directory={str(save_directory)!r}: holds {file_name}, and {method} is off; accepted is a "
                    "folder without one"
                )
        # Before diffusers saves, so that push_to_hub=True uploads these files too.
        if sla is not None and (sla != SLAConfig() or (folder / FILE_NAME).exists()):
            checkpoint = checkpoint_of(self)
            write_checkpoint(check_writable(folder, "save_directory") / FILE_NAME, checkpoint)
        if ras is not None:
            write_ras(check_writable(folder, "save_directory") / RAS_FILE_NAME, ras)
        with weights_left_out(self):
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def __repr__(self) -> str:
        """Return model_index.json under the name of this class."""
        return f"{type(self).__qualname__} {self.to_json_string()}"  # type: ignore[attr-defined]

    def enable(self, *, sla: SLAInput = None, ras: RASInput = None) -> None:
        """See `dit_accel.enable`."""
        control.enable(self, ras=ras, sla=sla)

    def disable(self) -> None:
        """See `dit_accel.disable`."""
        control.disable(self)

    def summary(self, *, strict: bool = False) -> control.Summary:
        """See `dit_accel.summary`."""
        return control.summary(self, strict=strict)
