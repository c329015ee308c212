"""Safetensors files of which each process writes its part of the tensors, and reads any part again."""

import contextlib
import errno
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

_PARTS = "parts"
"""Header entry of a file: by tensor, its first row and its number of rows in the whole."""


def local_part(x: Tensor) -> tuple[Tensor, int]:
    """Return the rows of a tensor that this process holds, and the index of the first one.

    A tensor that is not sharded is held whole.

    Raises:
        ValueError: it is sharded in another way than by rows over one group of processes.
    """
    if not isinstance(x, DTensor):
        return x.detach(), 0
    placements = tuple(x.placements)
    if len(placements) != 1 or not (placements[0].is_shard(0) or placements[0].is_replicate()):
        raise ValueError(f"placements={placements}: accepted is one group, sharded by rows")
    if not isinstance(placements[0], Shard):
        return x.to_local().detach(), 0
    # As torch.chunk: all but the last processes with rows hold equally many.
    size = -(-x.shape[0] // x.device_mesh.size())
    return x.to_local().detach(), min(x.device_mesh.get_local_rank() * size, x.shape[0])


def is_sharded(x: Tensor) -> bool:
    """Whether each process holds only some rows."""
    return isinstance(x, DTensor) and any(isinstance(p, Shard) for p in x.placements)


def write_shard(path: Path, tensors: Mapping[str, Tensor], *, rank: int) -> bool:
    """Write the part of this process; the first process also writes what is not sharded.

    Returns:
        Whether there was anything to write. If not, there is no file.

    Raises:
        OSError: the file could not be written.
    """
    parts: dict[str, tuple[int, int]] = {}
    local: dict[str, Tensor] = {}
    for name, x in tensors.items():
        if rank and not is_sharded(x):
            continue
        part, first = local_part(x)
        if is_sharded(x) and not part.numel():
            continue
        if x.ndim:
            parts[name] = (first, x.shape[0])
        # safetensors refuses views of shared memory.
        local[name] = part.cpu().contiguous().clone() if _is_view(part) else part.cpu()
    if not local and rank:
        return False
    with disk_errors(path):
        save_file(local, path, metadata={_PARTS: json.dumps(parts)})
    return True


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Context manager that raises OSError where safetensors cannot write: it has an error class of its own for that."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error


def _is_view(x: Tensor) -> bool:
    return not x.is_contiguous() or x.untyped_storage().nbytes() != x.numel() * x.element_size()


class ShardReader:
    """Tensors of a group of shard files, whatever number of processes wrote them.

    Args:
        files: the files of the group.

    Raises:
        ValueError: a file is damaged, or rows of a tensor are missing.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._stack = contextlib.ExitStack()
        self._parts: dict[str, list[tuple[int, int, Any]]] = {}
        rows: dict[str, int] = {}
        for path in files:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            parts = json.loads((file.metadata() or {}).get(_PARTS, "{}"))
            for name in file.keys():  # noqa: SIM118  # no mapping
                shape = file.get_slice(name).get_shape()
                first, whole = parts.get(name, (0, shape[0] if shape else 1))
                rows[name] = whole
                here = shape[0] if shape else 1
                self._parts.setdefault(name, []).append((first, first + here, file))
        for name, found in self._parts.items():
            found.sort(key=lambda part: part[0])
            reached = 0
            for first, last, _ in found:
                if first != reached:
                    break
                reached = last
            if reached != rows[name]:
                raise ValueError(f"{name}: rows {reached} to {rows[name]} are missing")

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return list(self._parts)

    def read(self, name: str, like: Tensor | None = None) -> Tensor:
        """Return a tensor on the CPU: whole, or the rows that this process holds of `like`."""
        found = self._parts[name]
        if like is None or not is_sharded(like):
            return (
                torch.cat([x.get_tensor(name) for *_, x in found])
                if len(found) > 1
                else found[0][2].get_tensor(name)
            )
        part, start = local_part(like)
        stop = start + part.shape[0]
        pieces = [
            file.get_slice(name)[max(start, first) - first : min(stop, last) - first]
            for first, last, file in found
            if first < stop and last > start
        ]
        return torch.cat(pieces) if pieces else torch.zeros_like(part, device="cpu")

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the whole tensor."""
        _, last, file = self._parts[name][-1]
        shape = tuple(file.get_slice(name).get_shape())
        return (last, *shape[1:]) if shape else ()
