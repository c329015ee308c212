"""Tile sizes, warps and pipeline depth of each kernel, by chip, head_dim, dtype and direction.

`make kernel-table` compiles every row ahead of time and lists registers, spills and shared memory
(docs/kernel-table.md). The fastest tile of a chip can only be measured on that chip.
"""

import functools
from typing import Literal, NamedTuple

import torch

Kernel = Literal["forward", "rows", "columns", "linear_columns", "state"]


class Target(NamedTuple):
    """Backend and architecture that kernels are compiled for."""

    backend: Literal["cuda", "hip", "interpreter"]
    arch: str
    """Architecture, such as "90" for compute capability 9.0 (H100, H200), or "gfx942" for HIP (MI300)."""

    @classmethod
    @functools.lru_cache(maxsize=64)
    def of(cls, device: torch.device) -> "Target":
        """Return the target of a device, from its compute capability."""
        if device.type != "cuda":
            return cls("interpreter", "")
        if torch.version.hip:
            return cls(
                "hip", torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
            )
        return cls("cuda", "".join(map(str, torch.cuda.get_device_capability(device))))


class Tile(NamedTuple):
    """Tile of one kernel."""

    q: int
    """Query rows per tile (state kernel: tokens). At most `block_q`, rounded up to a power of two."""
    k: int
    """Keys per tile (state kernel: value channels)."""
    warps: int
    stages: int


# Families of chips with the same shared memory and matrix instruction. Newer chips use the newest family.
_FAMILIES = {
    "80": "sm80",
    "87": "sm80",
    "86": "sm89",
    "89": "sm89",
    "90": "sm90",
    "120": "sm89",
    "121": "sm89",
}

# "heavy": with a linear branch. "extra": with columns. "means": with block means. "short": query blocks of at most
# 64 rows; a family without such a row uses the variant without "short".
Variant = Literal["plain", "heavy", "extra", "means"]

# Kernel and variant -> family -> padded head_dim -> Tile.
# Chosen to compile without spills in loops, with overlapping loads, within the shared memory. Not timed on a chip yet.
_TABLE: dict[tuple[Kernel, str], dict[str, dict[int, Tile]]] = {
    ("forward", "plain"): {
        "any": {64: Tile(128, 64, 8, 3), 128: Tile(128, 32, 8, 3), 256: Tile(64, 32, 8, 3)},
        "sm89": {64: Tile(128, 64, 8, 3), 128: Tile(128, 32, 8, 3), 256: Tile(32, 32, 4, 3)},
        "sm90": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 8, 3)},
        "sm100": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 8, 3)},
        "hip": {64: Tile(128, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(32, 32, 4, 2)},
    },
    ("forward", "short plain"): {
        "any": {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 8, 3), 256: Tile(64, 32, 8, 3)},
        "sm89": {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 8, 3), 256: Tile(32, 32, 4, 3)},
        "sm90": {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 3), 256: Tile(64, 32, 8, 3)},
        "sm100": {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 3), 256: Tile(64, 32, 8, 3)},
        "hip": {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(32, 32, 4, 2)},
    },
    ("forward", "heavy"): {
        "any": {64: Tile(64, 32, 4, 3), 128: Tile(64, 32, 8, 3)},
        "sm90": {64: Tile(64, 64, 4, 3), 128: Tile(128, 32, 8, 3)},
        "sm100": {64: Tile(64, 64, 4, 3), 128: Tile(128, 32, 8, 3)},
        "hip": {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 2)},
    },
    ("forward", "short heavy"): {
        "sm100": {64: Tile(64, 32, 4, 3), 128: Tile(64, 32, 4, 3)},
    },
    ("rows", "plain"): {
        "any": {64: Tile(64, 64, 8, 3), 128: Tile(64, 64, 8, 3), 256: Tile(64, 32, 8, 1)},
        "sm90": {64: Tile(64, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 8, 3)},
        "sm89": {64: Tile(64, 64, 8, 3), 128: Tile(64, 32, 4, 3), 256: Tile(64, 32, 8, 1)},
        "sm100": {64: Tile(64, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 8, 1)},
        "hip": {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 4, 1)},
    },
    ("rows", "short plain"): {
        "sm90": {64: Tile(64, 64, 4, 3), 128: Tile(64, 32, 4, 3), 256: Tile(64, 32, 8, 3)},
        "any": {64: Tile(64, 64, 8, 3), 128: Tile(64, 64, 8, 3), 256: Tile(64, 32, 8, 1)},
        "sm89": {64: Tile(64, 64, 8, 3), 128: Tile(64, 32, 4, 3), 256: Tile(64, 32, 8, 1)},
        "sm100": {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 3), 256: Tile(64, 32, 8, 1)},
        "hip": {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 4, 1)},
    },
    ("rows", "heavy"): {
        "any": {64: Tile(64, 32, 8, 3), 128: Tile(64, 32, 8, 3), 256: Tile(64, 32, 8, 1)},
        "sm89": {64: Tile(64, 32, 8, 3), 128: Tile(32, 32, 8, 3), 256: Tile(64, 32, 8, 1)},
        "sm90": {64: Tile(64, 32, 4, 3), 128: Tile(64, 32, 8, 3), 256: Tile(64, 32, 8, 3)},
        "sm100": {64: Tile(64, 32, 8, 3), 128: Tile(64, 32, 4, 3), 256: Tile(64, 32, 8, 1)},
        "hip": {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 4, 1)},
    },
    ("rows", "extra"): {
        "any": {64: Tile(64, 32, 8, 3), 128: Tile(64, 32, 8, 3), 256: Tile(64, 32, 8, 1)},
        "sm90": {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 8, 3), 256: Tile(64, 32, 8, 3)},
        "hip": {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 4, 1)},
    },
    ("rows", "means"): {
        "any": {64: Tile(64, 32, 8, 3), 128: Tile(64, 32, 8, 3), 256: Tile(64, 32, 8, 1)},
        "sm90": {64: Tile(64, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 8, 3)},
        "hip": {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 4, 1)},
    },
    ("columns", "plain"): {
        "any": {64: Tile(32, 64, 4, 3), 128: Tile(64, 32, 8, 3), 256: Tile(32, 32, 8, 1)},
        "sm90": {64: Tile(32, 64, 4, 3), 128: Tile(32, 64, 4, 3), 256: Tile(32, 32, 8, 3)},
        "sm100": {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 3), 256: Tile(32, 64, 8, 1)},
        "hip": {64: Tile(64, 64, 4, 2), 128: Tile(32, 64, 4, 2), 256: Tile(32, 32, 4, 1)},
    },
    ("linear_columns", "heavy"): {
        "any": {64: Tile(32, 64, 8, 3), 128: Tile(64, 32, 8, 3)},
        "sm90": {64: Tile(32, 64, 4, 3), 128: Tile(32, 64, 8, 3)},
        "sm100": {64: Tile(64, 64, 8, 3), 128: Tile(64, 64, 8, 3)},
        "hip": {64: Tile(64, 64, 4, 2), 128: Tile(32, 32, 4, 2)},
    },
    ("state", "plain"): {
        "any": {64: Tile(32, 64, 4, 3), 128: Tile(32, 64, 8, 3)},
        "sm100": {64: Tile(64, 64, 8, 3), 128: Tile(32, 64, 8, 3)},
        "hip": {64: Tile(64, 64, 4, 2), 128: Tile(32, 64, 4, 2)},
    },
}


@functools.lru_cache(maxsize=1024)
def tile(
    kernel: Kernel,
    target: Target,
    *,
    head_dim: int,
    dtype: torch.dtype,
    block_q: int,
    block_k: int,
    variant: Variant = "plain",
) -> Tile:
    """Return the tile of a launch: the table's row, limited to the block sizes of the plan."""
    if target.backend == "interpreter":  # its time is proportional to the number of tiles
        return Tile(min(128, pad(block_q)), min(128, pad(block_k)), 1, 1)
    single = dtype == torch.float32
    family = "hip" if target.backend == "hip" else _FAMILIES.get(target.arch, "sm100")
    if variant in ("extra", "means") and (kernel, variant) not in _TABLE:
        variant = "plain"
    names: list[str] = [variant, "plain", "heavy"]
    if block_q <= 64 and not single:
        names = [f"short {variant}", *names]
    tables = (_TABLE.get((kernel, x), {}) for x in names)
    rows = next(y for x in tables if (y := x.get(family, x.get("any"))))
    row = rows[max(64, pad(head_dim))]
    if single:  # fp32 needs twice the shared memory, and tf32x3 more registers
        row = Tile(max(16, row.q // 4), max(16, row.k // 4), row.warps, 1)
    return Tile(min(row.q, pad(block_q)), min(row.k, pad(block_k)), row.warps, row.stages)


def multiplies_from_memory(target: Target) -> bool:
    """Return whether matrix instructions read the second operand from shared memory (wgmma, tcgen05)."""
    return target.backend == "cuda" and _FAMILIES.get(target.arch, "sm100") in ("sm90", "sm100")


def pad(n: int) -> int:
    """Return the next power of two, at least 16, the smallest size of a matrix instruction."""
    return max(16, 1 << (n - 1).bit_length())
