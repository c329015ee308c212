"""Save sharded tensors: each process writes its rows to a safetensors file, and any process can read any rows."""

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
"""Key in the header of a file. Its value maps each tensor to its first row and the number of rows of the full tensor."""


def local_part(x: Tensor) -> tuple[Tensor, int]:
    """Return the rows of a tensor that this process holds, and the index of the first row.

    A tensor that is not sharded is returned in full.

    Raises:
        ValueError: if the tensor is not sharded by rows over one group of processes.
    """
    if not isinstance(x, DTensor):
        return x.detach(), 0
    placements = tuple(x.placements)
    if len(placements) != 1 or not (placements[0].is_shard(0) or placements[0].is_replicate()):
        raise ValueError(f"placements={placements}: expected one group, sharded by rows")
    if not isinstance(placements[0], Shard):
        return x.to_local().detach(), 0
    # Rows are split as by torch.chunk: all chunks except the last have this size.
    size = -(-x.shape[0] // x.device_mesh.size())
    return x.to_local().detach(), min(x.device_mesh.get_local_rank() * size, x.shape[0])


def is_sharded(x: Tensor) -> bool:
    """Return True if each process holds only some rows of the tensor."""
    return isinstance(x, DTensor) and any(isinstance(p, Shard) for p in x.placements)


def write_shard(path: Path, tensors: Mapping[str, Tensor], *, rank: int) -> bool:
    """Write the rows that this process holds. Rank 0 also writes the tensors that are not sharded.

    Args:
        path: file to write.
        tensors: tensors by name.
        rank: rank of this process.

    Returns:
        False if there was nothing to write. No file is created then.

    Raises:
        OSError: if the file could not be written.
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
        # safetensors does not save views of shared storage.
        local[name] = part.cpu().contiguous().clone() if _is_view(part) else part.cpu()
    if not local and rank:
        return False
    with disk_errors(path):
        save_file(local, path, metadata={_PARTS: json.dumps(parts)})
    return True


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Context manager that turns the SafetensorError of a failed write into an OSError."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error


def _is_view(x: Tensor) -> bool:
    return not x.is_contiguous() or x.untyped_storage().nbytes() != x.numel() * x.element_size()


class ShardReader:
    """Read the tensors of a group of shard files. Any number of processes may have written them.

    Args:
        files: all files of the group.

    Raises:
        ValueError: if rows of a tensor are missing.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._stack = contextlib.ExitStack()
        self._parts: dict[str, list[tuple[int, int, Any]]] = {}
        rows: dict[str, int] = {}
        for path in files:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            parts = json.loads((file.metadata() or {}).get(_PARTS, "{}"))
            for name in file.keys():  # noqa: SIM118  # `file` is not a mapping
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
        """Return a tensor on the CPU.

        Args:
            name: name of the tensor.
            like: sharded tensor of the same shape. Only the rows that this process holds of it are read. Default:
                read all rows.
        """
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
        """Return the shape of the full tensor."""
        _, last, file = self._parts[name][-1]
        shape = tuple(file.get_slice(name).get_shape())
        return (last, *shape[1:]) if shape else ()
