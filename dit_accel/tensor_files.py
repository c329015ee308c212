"""Safetensors files: opening, comparison of shapes, and hashes."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor


@contextlib.contextmanager
def open_safetensors(path: str | os.PathLike) -> Iterator[Any]:
    """Context manager that opens a file with `safe_open`.

    Raises:
        ValueError: the file does not exist or is not a safetensors file; the message says what it is.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; accepted is a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: {_kind(path, error)}; accepted is a safetensors file") from None


def mismatch(found: Mapping[str, tuple], expected: Mapping[str, tuple]) -> str:
    """Return how names and shapes of a state dict differ from the expected ones; empty if they are equal."""
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


def _kind(path: str | os.PathLike, error: Exception) -> str:
    with Path(path).open("rb") as file:
        head = file.read(64)
    if head.startswith(b"PK\3\4"):
        return "a zip archive, as torch.save writes it (a pickle)"
    # A safetensors file begins with the length of its header. The third byte is 0 for headers below 64 KiB.
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5") and any(head[2:3]):
        return "a pickle"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of git-lfs, not the file (git lfs pull fetches it)"
    if head.lstrip().startswith(b"<"):
        return "a web page"
    return f"truncated, damaged or something else ({error})" if head else "empty"
