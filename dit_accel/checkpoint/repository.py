"""Read the index of a diffusers repository, and write copies of repositories with another transformer."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from accelerate import init_empty_weights
from torch import Tensor

from dit_accel.checkpoint.file import FILE_NAME, SLACheckpoint, write_checkpoint
from dit_accel.files import atomic_directory, check_writable
from dit_accel.models import FAMILIES
from dit_accel.runtime.components import TRANSFORMERS
from dit_accel.tensor_files import mismatch


def read_index(
    source: str | os.PathLike, argument: str = "pretrained_model_name_or_path", **hub: Any
) -> dict[str, Any]:
    """Return the content of `model_index.json` of a folder or a hub repository.

    Args:
        source: folder or hub id.
        argument: name of the argument for `source`, for messages.
        **hub: arguments of `DiffusionPipeline.load_config` (`revision`, `token`, ...).

    Raises:
        ValueError: if the file is missing, or if it cannot be read or downloaded.
    """
    path, name = Path(source), f"{argument}={str(source)!r}"
    if not path.is_dir():
        try:
            return diffusers.DiffusionPipeline.load_config(str(source), **hub)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{name}: neither a folder nor a repository that can be reached; expected a diffusers repository (folder "
                "or hub id)"
            ) from error
    try:
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{name}: the folder has no model_index.json; expected a diffusers repository"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: model_index.json is not readable ({error})") from None
    if not isinstance(index, dict):
        raise ValueError(
            f"{name}: model_index.json holds no mapping; expected a file written by diffusers"
        )
    return index


def transformers_in(index: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> list[str]:
    """Return the names of the transformers of a repository.

    Args:
        index: content of `model_index.json`.
        given: components that replace components of the repository, by name. None removes a component.
    """
    held = {name: (index.get(name) or [None])[0] for name in TRANSFORMERS} | dict(given or {})
    return [name for name in TRANSFORMERS if held[name] is not None]


def check_output(output_dir: str | os.PathLike) -> Path:
    """Check that the output folder is empty or new and can be written, and return its path.

    Raises:
        ValueError: if the folder is not empty, or if it cannot be written.
    """
    path = Path(output_dir)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"output_dir={str(output_dir)!r}: already exists; expected a new or empty folder"
        )
    check_writable(path.parent, "output_dir")
    return path


def empty_transformer(model: str | os.PathLike) -> Any:
    """Return the transformer of a diffusers repository on the meta device, without weights.

    Args:
        model: folder of the repository.

    Raises:
        ValueError: if there is no such repository, or if its model is not supported.
    """
    folder, name = Path(model), f"model={str(model)!r}"
    if not folder.is_dir():
        raise ValueError(f"{name}: no such folder; expected the folder of a diffusers repository")
    index = read_index(folder, argument="model")
    if (index.get("transformer_2") or [None])[0] is not None:
        raise ValueError(
            f"{name}: has a transformer_2 (Wan2.2); expected a model with one transformer"
        )
    kind = (index.get("transformer") or [None, None])[1]
    if kind not in FAMILIES:
        raise ValueError(f"{name}: its transformer is a {kind}; expected {', '.join(FAMILIES)}")
    return without_weights(getattr(diffusers, kind), folder / "transformer", name)


def without_weights(cls: Any, folder: Path, name: str) -> Any:
    """Create a transformer from the config.json of a folder, with parameters on the meta device.

    Args:
        cls: class of the transformer.
        folder: folder that holds config.json.
        name: name of the model in messages.

    Raises:
        ValueError: if the config cannot be read, or if it describes another class.
    """
    try:
        config = cls.load_config(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: no readable config ({str(error).splitlines()[0]})") from None
    if (found := config.get("_class_name")) != cls.__name__:
        raise ValueError(f"{name}: {folder.name} holds a {found}; expected {cls.__name__}")
    try:
        with init_empty_weights():
            return cls.from_config(config)
    except Exception as error:  # constructors raise many kinds of errors on wrong values
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise ValueError(
            f"{name}: config.json of {folder.name} does not describe a {cls.__name__} ({reason})"
        ) from None


def fill(transformer: Any, weights: Mapping[str, Tensor], name: str) -> None:
    """Load weights into an empty transformer without copying them. Names and shapes must match exactly.

    Args:
        transformer: transformer on the meta device.
        weights: state dict.
        name: name of the weights in messages.

    Raises:
        ValueError: if weights are missing, unexpected, not floating-point, or of another shape.
    """
    expected = {key: tuple(x.shape) for key, x in transformer.state_dict().items()}
    if problem := mismatch({key: tuple(x.shape) for key, x in weights.items()}, expected):
        raise ValueError(f"{name}: {problem}")
    for key, x in weights.items():
        if not x.is_floating_point():
            raise ValueError(f"{name}: {key} is {x.dtype}; expected floating-point weights")
    transformer.load_state_dict(weights, strict=True, assign=True)


def write_repository(
    model: str | os.PathLike,
    output_dir: str | os.PathLike,
    transformer: Any,
    sla_checkpoint: SLACheckpoint | None,
) -> None:
    """Write a copy of a repository with another transformer and SLA checkpoint, atomically.

    Args:
        model: folder of the repository to copy.
        output_dir: folder to write. It must be empty or not exist.
        transformer: the new transformer.
        sla_checkpoint: SLA checkpoint to write, or None.
    """
    with atomic_directory(output_dir) as folder:
        for entry in sorted(Path(model).iterdir()):
            # Skip hidden entries, which belong to git or to the download cache.
            if entry.name in ("transformer", FILE_NAME) or entry.name.startswith("."):
                continue
            if entry.is_dir():
                shutil.copytree(entry, folder / entry.name, copy_function=shutil.copyfile)
            else:
                shutil.copyfile(entry, folder / entry.name)
        transformer.save_pretrained(folder / "transformer")
        for weights in (folder / "transformer").glob("*.safetensors"):
            weights.chmod(0o644)  # safetensors creates files with mode 0600
        if sla_checkpoint is not None:
            write_checkpoint(folder / FILE_NAME, sla_checkpoint)
