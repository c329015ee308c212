"""Tile sizes, warps and pipeline depth of each kernel, by chip, head_dim, dtype and direction.

Every row is compiled ahead of time by `make kernel-table`, which prints registers, spills and shared
memory (docs/kernel-table.md). What runs fastest on a chip has to be measured there.
"""

from typing import Literal, NamedTuple

import torch

Kernel = Literal["forward", "rows", "columns", "linear_columns"]


class Target(NamedTuple):
    """A kind of chip."""

    backend: Literal["cuda", "hip", "interpreter"]
    arch: str
    """"90" for compute capability 9.0 (H100, H200), "gfx942" for HIP (MI300)."""

    @classmethod
    def of(cls, device: torch.device) -> "Target":
        """By capability, never by name."""
        if device.type != "cuda":
            return cls("interpreter", "")
        if torch.version.hip:
            return cls(
                "hip", torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
            )
        return cls("cuda", "".join(map(str, torch.cuda.get_device_capability(device))))


class Tile(NamedTuple):
    """Of one kernel."""

    q: int
    """Query rows per tile; at most `block_q`, rounded up to a power of two."""
    k: int
    warps: int
    stages: int


# (kernel, linear branch over the tiles) -> padded head_dim -> Tile
_BASE: dict[tuple[str, bool], dict[int, Tile]] = {
    ("forward", False): {
        64: Tile(128, 64, 4, 3),
        128: Tile(128, 64, 8, 3),
        256: Tile(64, 32, 8, 2),
    },
    ("forward", True): {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 1)},
    ("rows", False): {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 1)},
    ("rows", True): {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 1)},
    ("columns", False): {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 64, 8, 1)},
    ("columns", True): {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 64, 8, 1)},
    ("linear_columns", False): {
        64: Tile(64, 64, 4, 2),
        128: Tile(64, 64, 8, 2),
        256: Tile(32, 64, 8, 1),
    },
    ("linear_columns", True): {
        64: Tile(64, 64, 4, 2),
        128: Tile(64, 64, 8, 2),
        256: Tile(32, 64, 8, 1),
    },
}


def tile(
    kernel: Kernel,
    target: Target,
    *,
    head_dim: int,
    dtype: torch.dtype,
    block_q: int,
    block_k: int,
    linear: bool = False,
) -> Tile:
    """The tile of a launch: the table's row, cut to the blocks of the plan."""
    if target.backend == "interpreter":  # its time goes by the number of tiles
        return Tile(min(128, pad(block_q)), min(128, pad(block_k)), 1, 1)
    padded = max(64, pad(head_dim))
    row = _BASE[kernel, linear][padded]
    if dtype == torch.float32:  # twice the shared memory, and tf32x3 needs registers
        row = Tile(max(16, row.q // 4), max(16, row.k // 4), row.warps, 1)
    return Tile(min(row.q, pad(block_q)), min(row.k, pad(block_k)), row.warps, row.stages)


def pad(n: int) -> int:
    """The next power of two, at least 16: what a matrix instruction takes."""
    return max(16, 1 << (n - 1).bit_length())
