"""Safetensors files: open one, hash one, and read the weights of a model in one file or in a folder with several."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS = "diffusion_pytorch_model.safetensors"
"""File in which `save_pretrained` of a diffusers model writes weights that fit into one file."""


@contextlib.contextmanager
def open_safetensors(path: str | os.PathLike) -> Iterator[Any]:
    """Open a file with `safe_open`; a ValueError says what another kind of file is."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; accepted is a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: {_kind(path, error)}; accepted is a safetensors file") from None


def read_weights(path: Path, name: str) -> dict[str, Tensor]:
    """Return a state dict, memory-mapped: of a file, or of a folder that `save_pretrained` of a model wrote.

    Args:
        path: the file or folder.
        name: how messages about an index call the folder.

    Raises:
        ValueError: a file is missing, damaged or no safetensors file.
    """
    if not path.is_dir():
        return _tensors([path])
    index = path / f"{WEIGHTS}.index.json"
    if not index.is_file():
        return _tensors([path / WEIGHTS])
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{name}: {index.name} is not readable ({error})") from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{name}: {index.name} names {shard!r}; accepted are files beside it")
    return _tensors([path / shard for shard in sorted(shards)])


def mismatch(found: Mapping[str, tuple], expected: Mapping[str, tuple]) -> str:
    """Describe how names and shapes of a state dict differ from the expected ones; empty: they do not."""
    parts = []
    for label, names in (
        ("missing", expected.keys() - found.keys()),
        ("not expected", found.keys() - expected.keys()),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{label}: {', '.join(sorted(names)[:3])}{more}")
    for name in sorted(found.keys() & expected.keys()):
        if found[name] != expected[name]:
            parts.append(f"{name} has shape {found[name]}; accepted: {expected[name]}")
            break
    return "; ".join(parts)


def digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of the header (without the digest) and of the tensors' names, shapes, dtypes and bytes."""
    state = hashlib.sha256()
    for key in sorted(header.keys() - {"digest"}):
        state.update(json.dumps([key, header[key]]).encode())
    for name in sorted(tensors):
        x = tensors[name]
        state.update(json.dumps([name, list(x.shape), str(x.dtype)]).encode())
        state.update(x.numpy().tobytes())
    return state.hexdigest()


def _tensors(paths: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in paths:
        with open_safetensors(path) as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return tensors


def _kind(path: str | os.PathLike, error: Exception) -> str:
    with Path(path).open("rb") as file:
        head = file.read(64)
    if head.startswith(b"PK\3\4"):
        return "a zip archive, as torch.save writes it (a pickle)"
    # A safetensors file begins with the length of its header, which is seldom 64 KiB and more.
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5") and any(head[2:3]):
        return "a pickle"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of git-lfs, not the file (git lfs pull fetches it)"
    if head.lstrip().startswith(b"<"):
        return "a web page"
    return f"truncated, damaged or something else ({error})" if head else "empty"
