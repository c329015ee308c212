"""`SparsePipelineMixin`: what every sparse pipeline adds to its diffusers parent."""

import json
import os
from pathlib import Path
from typing import Any, ClassVar

from diffusers import DiffusionPipeline

from dit_accel import control
from dit_accel.checkpoint import save_load
from dit_accel.checkpoint.file import FILE_NAME, SLACheckpoint, read_checkpoint, settings_of
from dit_accel.config import RASConfig, SLAConfig

# What decides which files DiffusionPipeline.load_config reads.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


_DEFAULT: Any = object()


def read_index(
    source: str | os.PathLike, argument: str = "pretrained_model_name_or_path", **hub: Any
) -> dict[str, Any]:
    """model_index.json of a folder or a hub repository; messages call it `argument`.

    Raises:
        ValueError: there is none, or it cannot be read or reached.
    """
    path, name = Path(source), f"{argument}={str(source)!r}"
    if not path.is_dir():
        try:
            return DiffusionPipeline.load_config(str(source), **hub)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{name}: neither a folder nor a repository that could be reached; "
                "accepted is a diffusers repository (folder or hub id)"
            ) from error
    try:
        return json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{name}: no model_index.json in this folder; accepted is a diffusers repository"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: model_index.json is not readable ({error})") from None


class SparsePipelineMixin:
    """Comes first among the bases: `class SparseX(SparsePipelineMixin, X)`."""

    _parent: ClassVar[str]
    """Class name of the diffusers parent, as it stands in model_index.json."""
    _aliases: ClassVar[tuple[str, ...]] = ()
    """Older names of the parent that repositories may carry."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        sla: SLAConfig | SLACheckpoint | dict | str | os.PathLike | None = _DEFAULT,
        ras: RASConfig | dict | str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a plain diffusers repository and accelerate it.

        Args:
            pretrained_model_name_or_path: hub id or folder, as in diffusers.
            sla: sparse attention: a preset ("quality", "balanced", "fast"), a YAML file, an
                `SLAConfig`, a dict of its fields, a folder or file that `save_sla` wrote, or None for
                dense. Default: the `sla.safetensors` of the repository, and "balanced" without one.
            ras: region-adaptive sampling: a preset ("quality", "balanced", "fast", "paper"), a YAML
                file, an `RASConfig`, a dict of its fields, or None for all tokens in each step.
            **kwargs: everything the diffusers parent accepts.

        Raises:
            ValueError: a bad argument, or a repository of another pipeline class. Checked on
                model_index.json, before any weight is read.
        """
        settings, ras_config = cls._settings(sla, ras)
        hub = {k: kwargs[k] for k in _HUB_ARGUMENTS if k in kwargs}
        cls._check_repository(pretrained_model_name_or_path, kwargs, hub)
        if sla is _DEFAULT:
            hub.pop("proxies", None)  # diffusers takes them, huggingface_hub does not
            path = save_load.own_checkpoint(pretrained_model_name_or_path, **hub)
            settings = settings if path is None else read_checkpoint(path)
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        if settings is not None or ras_config is not None:
            try:
                control.enable(pipe, sla=settings, ras=ras_config)
            except ValueError:
                del pipe  # large; the caller may catch the error and go on
                raise
        return pipe

    @classmethod
    def from_pipe(
        cls,
        pipeline: Any,
        *,
        sla: SLAConfig | SLACheckpoint | dict | str | os.PathLike | None = _DEFAULT,
        ras: RASConfig | dict | str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make a sparse pipeline from a loaded one; the components are shared, not copied.

        Shared components share their acceleration: if the transformer is already sparse, it stays
        as it is, and `sla` and `ras` must be left out or be equal.

        Args:
            pipeline: a loaded diffusers pipeline of the same family.
            sla, ras: as in `from_pretrained`; the default of `sla` is "balanced".
            **kwargs: everything the diffusers parent accepts. As in diffusers, `dtype`
                defaults to float32; pass the dtype that the components have to keep it.
        """
        settings, ras_config = cls._settings(sla, ras)
        session = control.session_of(pipeline)
        if session is not None:
            asked = (
                ("sla", sla, save_load.runs_with(pipeline, settings)),
                ("ras", ras, ras_config == session.ras_config),
            )
            for name, given, same in asked:
                if not (given is _DEFAULT or given is None or same):
                    raise ValueError(
                        f"{name}: this transformer is already enabled with other settings; call disable() first"
                    )
        if getattr(pipeline, "transformer_2", None) is not None:
            raise ValueError("pipeline.transformer_2: Wan2.2 is not supported; accepted: None")
        pipe = super().from_pipe(pipeline, **kwargs)  # type: ignore[misc]
        if control.session_of(pipe) is None and (settings or ras_config):
            control.enable(pipe, sla=settings, ras=ras_config)
        return pipe

    @classmethod
    def _settings(
        cls, sla: Any, ras: Any
    ) -> tuple[SLAConfig | SLACheckpoint | None, RASConfig | None]:
        if sla is _DEFAULT:
            sla = "balanced"
        return (
            None if sla is None else settings_of(sla),
            None if ras is None else RASConfig.load(ras),
        )

    @classmethod
    def _check_repository(
        cls, source: str | os.PathLike, kwargs: dict[str, Any], hub: dict[str, Any]
    ) -> None:
        name = f"pretrained_model_name_or_path={str(source)!r}"
        index = read_index(source, **hub)
        found = index.get("_class_name")
        if found not in (cls._parent, *cls._aliases, cls.__name__):
            raise ValueError(
                f"{name}: holds a {found}; {cls.__name__} accepts a {cls._parent} repository"
            )
        second = index.get("transformer_2")
        if second is not None and second[0] is not None and "transformer_2" not in kwargs:
            raise ValueError(
                f"{name}: has a transformer_2 (Wan2.2), which is not supported; "
                "accepted are one-transformer repositories (Wan2.1)"
            )

    def to_json_string(self) -> str:
        """model_index.json, under the parent's class name, so that plain diffusers can load it."""
        saved = json.loads(super().to_json_string())  # type: ignore[misc]
        saved["_class_name"] = self._parent
        return json.dumps(saved, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, and `sla.safetensors` beside it if sparse attention is on and not just the default.

        Plain diffusers loads the repository as the plain model; this class loads both.

        Raises:
            ValueError: sparse attention is off, and the folder holds an adapter, which would be loaded with
                what is saved now; or it is on and cannot be saved yet (see `save_sla`).
        """
        session, path = control.session_of(self), Path(save_directory) / FILE_NAME
        if session is not None and session.sla is not None:
            if session.sla.config != SLAConfig() or path.exists():
                # First, so that push_to_hub finds it.
                save_load.save_sla(self, save_directory)
        elif path.exists():
            raise ValueError(
                f"save_directory={str(save_directory)!r}: holds {path.name}, and sparse attention is off; accepted is a "
                "folder without one"
            )
        with save_load.weights_left_out(self):
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def enable(
        self,
        *,
        sla: SLAConfig | SLACheckpoint | dict | str | os.PathLike | None = None,
        ras: RASConfig | dict | str | os.PathLike | None = None,
    ) -> None:
        """See `dit_accel.enable`."""
        control.enable(self, ras=ras, sla=sla)

    def disable(self) -> None:
        """See `dit_accel.disable`."""
        control.disable(self)

    def summary(self, *, strict: bool = False) -> control.Summary:
        """See `dit_accel.summary`."""
        return control.summary(self, strict=strict)
