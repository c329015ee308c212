"""`SparsePipelineMixin`: what every sparse pipeline adds to its diffusers parent."""

import json
import os
from pathlib import Path
from typing import Any, ClassVar

from diffusers import DiffusionPipeline

from dit_accel import control
from dit_accel.config import RASConfig, SLAConfig

# What decides which files DiffusionPipeline.load_config reads.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


_DEFAULT: Any = object()


def read_index(source: str | os.PathLike, **hub: Any) -> dict[str, Any]:
    """model_index.json of a folder or a hub repository.

    Raises:
        ValueError: there is none, or it cannot be read or reached.
    """
    path, name = Path(source), f"pretrained_model_name_or_path={str(source)!r}"
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
    _sla: ClassVar[str | None] = None
    """Preset of `default_sla`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        sla: SLAConfig | dict | str | os.PathLike | None = _DEFAULT,
        ras: RASConfig | dict | str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a plain diffusers repository and accelerate it.

        Args:
            pretrained_model_name_or_path: hub id or folder, as in diffusers.
            sla: sparse attention: a preset ("quality", "balanced", "fast"), a YAML file, an
                `SLAConfig`, a dict of its fields, or None for dense. Default: "balanced" for Wan,
                None for families that have no sparse attention yet.
            ras: region-adaptive sampling: a preset ("quality", "balanced", "fast", "paper"), a YAML
                file, an `RASConfig`, a dict of its fields, or None for all tokens in each step.
            **kwargs: everything the diffusers parent accepts.

        Raises:
            ValueError: a bad argument, or a repository of another pipeline class. Checked on
                model_index.json, before any weight is read.
        """
        sla_config, ras_config = cls._configs(sla, ras)
        cls._check_repository(pretrained_model_name_or_path, kwargs)
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        if sla_config is not None or ras_config is not None:
            try:
                control.enable(pipe, sla=sla_config, ras=ras_config)
            except ValueError:
                del pipe  # large; the caller may catch the error and go on
                raise
        return pipe

    @classmethod
    def from_pipe(
        cls,
        pipeline: Any,
        *,
        sla: SLAConfig | dict | str | os.PathLike | None = _DEFAULT,
        ras: RASConfig | dict | str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make a sparse pipeline from a loaded one; the components are shared, not copied.

        Shared components share their acceleration: if the transformer is already sparse, it stays
        as it is, and `sla` and `ras` must be left out or be equal.

        Args:
            pipeline: a loaded diffusers pipeline of the same family.
            sla, ras: as in `from_pretrained`.
            **kwargs: everything the diffusers parent accepts. As in diffusers, `dtype`
                defaults to float32; pass the dtype that the components have to keep it.
        """
        sla_config, ras_config = cls._configs(sla, ras)
        session = control.session_of(pipeline)
        if session is not None:
            asked = (
                ("sla", sla, sla_config, session.sla_config),
                ("ras", ras, ras_config, session.ras_config),
            )
            for name, given, new, old in asked:
                if given not in (_DEFAULT, None) and new != old:
                    raise ValueError(
                        f"{name}: this transformer is already enabled with other settings; call disable() first"
                    )
        if getattr(pipeline, "transformer_2", None) is not None:
            raise ValueError("pipeline.transformer_2: Wan2.2 is not supported; accepted: None")
        pipe = super().from_pipe(pipeline, **kwargs)  # type: ignore[misc]
        if control.session_of(pipe) is None and (sla_config or ras_config):
            control.enable(pipe, sla=sla_config, ras=ras_config)
        return pipe

    @classmethod
    def _configs(cls, sla: Any, ras: Any) -> tuple[SLAConfig | None, RASConfig | None]:
        if sla is _DEFAULT:
            sla = cls.default_sla()
        return (
            None if sla is None else SLAConfig.load(sla),
            None if ras is None else RASConfig.load(ras),
        )

    @classmethod
    def default_sla(cls) -> SLAConfig | None:
        """Sparse attention where nothing is said; None for families that have none yet."""
        return None if cls._sla is None else SLAConfig.load(cls._sla)

    @classmethod
    def _check_repository(cls, source: str | os.PathLike, kwargs: dict[str, Any]) -> None:
        name = f"pretrained_model_name_or_path={str(source)!r}"
        index = read_index(source, **{k: kwargs[k] for k in _HUB_ARGUMENTS if k in kwargs})
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

    def enable(
        self,
        *,
        sla: SLAConfig | dict | str | os.PathLike | None = None,
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
