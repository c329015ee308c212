"""What `merge` and `convert` share: a diffusers repository that gets another transformer."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from accelerate import init_empty_weights
from torch import Tensor

from dit_accel.checkpoint.file import FILE_NAME, SLACheckpoint, mismatch, write_checkpoint
from dit_accel.files import atomic_directory, check_writable
from dit_accel.models import FAMILIES
from dit_accel.pipelines.base import read_index


def check_output(output_dir: str | os.PathLike) -> Path:
    """Refuse, before anything is read, a folder that holds something or cannot be made."""
    path = Path(output_dir)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"output_dir={str(output_dir)!r}: exists already; accepted is a new or empty folder"
        )
    check_writable(path.parent, "output_dir")
    return path


def empty_transformer(model: str | os.PathLike) -> Any:
    """The transformer of a diffusers repository (a folder), without weights.

    Raises:
        ValueError: no such repository, or none of a supported model.
    """
    folder, name = Path(model), f"model={str(model)!r}"
    if not folder.is_dir():
        raise ValueError(
            f"{name}: no such folder; accepted is the folder of a diffusers repository"
        )
    index = read_index(folder, argument="model")
    if (index.get("transformer_2") or [None])[0] is not None:
        raise ValueError(
            f"{name}: has a transformer_2 (Wan2.2); accepted are one-transformer models"
        )
    kind = (index.get("transformer") or [None, None])[1]
    if kind not in FAMILIES:
        raise ValueError(f"{name}: its transformer is a {kind}; accepted are {', '.join(FAMILIES)}")
    return without_weights(getattr(diffusers, kind), folder / "transformer", name)


def without_weights(cls: Any, folder: Path, name: str) -> Any:
    """A transformer made from the config.json of a folder; parameters are on the meta device."""
    try:
        config = cls.load_config(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: no readable config ({str(error).splitlines()[0]})") from None
    if (found := config.get("_class_name")) != cls.__name__:
        raise ValueError(f"{name}: {folder.name} holds a {found}; accepted: {cls.__name__}")
    try:
        with init_empty_weights():
            return cls.from_config(config)
    except Exception as error:  # whatever wrong values make of the constructor
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise ValueError(
            f"{name}: config.json of {folder.name} is no {cls.__name__} ({reason})"
        ) from None


def fill(transformer: Any, weights: Mapping[str, Tensor], name: str) -> None:
    """Give it its weights, without a copy; they have to fit exactly.

    Raises:
        ValueError: missing, unexpected or misshapen weights; the message begins with `name`.
    """
    expected = {key: tuple(x.shape) for key, x in transformer.state_dict().items()}
    if problem := mismatch({key: tuple(x.shape) for key, x in weights.items()}, expected):
        raise ValueError(f"{name}: {problem}")
    for key, x in weights.items():
        if not x.is_floating_point():
            raise ValueError(f"{name}: {key} is {x.dtype}; accepted are floating-point weights")
    transformer.load_state_dict(weights, strict=True, assign=True)


def write_repository(
    model: str | os.PathLike,
    output_dir: str | os.PathLike,
    transformer: Any,
    adapter: SLACheckpoint | None,
) -> None:
    """Everything of the repository `model` but its transformer and adapter, and these instead.

    `output_dir` appears complete or not at all.
    """
    with atomic_directory(output_dir) as folder:
        for entry in sorted(Path(model).iterdir()):
            # Hidden ones are a download's or git's own.
            if entry.name in ("transformer", FILE_NAME) or entry.name.startswith("."):
                continue
            if entry.is_dir():
                shutil.copytree(entry, folder / entry.name, copy_function=shutil.copyfile)
            else:
                shutil.copyfile(entry, folder / entry.name)
        transformer.save_pretrained(folder / "transformer")
        for weights in (folder / "transformer").glob("*.safetensors"):
            weights.chmod(0o644)  # safetensors writes files that only their owner can read
        if adapter is not None:
            write_checkpoint(folder / FILE_NAME, adapter)
