"""Vertical-slash: single keys and diagonals with high attention from the last queries (MInference, arXiv 2407.02490)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dit_accel.config.base import check, check_fraction, is_int
from dit_accel.kernels import SparsePlan
from dit_accel.llm.prefill.estimate import last_query_sums, top_columns
from dit_accel.llm.prefill.pattern import Pattern, Prompt


@dataclass(frozen=True)
class VerticalSlash(Pattern):
    """Pattern of the keys (columns) and distances (slashes) with the highest attention from the last queries of each head.

    Slashes are selected in bands of `block` adjacent distances, because a band costs hardly more than a single slash. All
    pairs at a selected distance are read. Columns are selected outside of the first block and the last two blocks, which
    are always read.
    """

    name: ClassVar[str] = "vertical_slash"
    columns: float | int = 0.04
    """Share of the keys to select as columns, in (0, 1]."""
    slashes: float | int = 0.1
    """Share of the bands to select, in (0, 1]."""
    min_columns: int = 30
    """Smallest number of columns per head."""
    min_slashes: int = 1
    """Smallest number of bands per head."""
    last: int = 64
    """Number of last queries whose attention is computed."""

    def __post_init__(self) -> None:
        check_fraction("columns", self.columns)
        check_fraction("slashes", self.slashes)
        for name in ("min_columns", "min_slashes"):
            value = getattr(self, name)
            check(name, value, is_int(value) and value >= 0, "an int >= 0")
        check("last", self.last, is_int(self.last) and self.last >= 1, "an int >= 1")

    def plan(self, prompt: Prompt) -> SparsePlan:
        sums = last_query_sums(prompt.q, prompt.k, scale=prompt.scale, last=self.last)
        n_bands = max(self.min_slashes, math.ceil(self.slashes * prompt.num_k_blocks - 1e-9))
        mask = slash_blocks(prompt, best_bands(by_block(sums.diagonals, prompt.block), n_bands))
        n_columns = max(self.min_columns, math.ceil(self.columns * prompt.kv_len - 1e-9))
        worth = sums.columns.clone()
        worth[..., : prompt.block] = 0
        worth[..., max(0, prompt.num_k_blocks - 2) * prompt.block :] = 0
        return self.from_blocks(prompt, mask, top_columns(worth, n_columns))


def by_block(sums: Float[Tensor, "b h n"], block: int) -> Float[Tensor, "b h n_blocks"]:
    """Return the sums over blocks of `block` adjacent numbers."""
    short = -sums.shape[-1] % block
    return torch.nn.functional.pad(sums, (0, short)).unflatten(-1, (-1, block)).sum(-1)


def best_bands(
    worth: Float[Tensor, "b h n_bands"], count: int | Tensor
) -> Bool[Tensor, "b h n_bands"]:
    """Return the mask of the best bands of each head. `count` is one number for all heads, or a tensor `[B, H, 1]`."""
    return worth.argsort(dim=-1, descending=True, stable=True).argsort(-1) < count


def slash_blocks(prompt: Prompt, bands: Bool[Tensor, "b h n_bands"]) -> Bool[Tensor, "b h n_q n_k"]:
    """Return the mask of blocks that contain a pair at a distance in one of the bands.

    Args:
        prompt: the attention call.
        bands: mask `[B, H, T_k]`; band m holds the distances from `m * block` to `(m + 1) * block - 1`.
    """
    block, length = prompt.block, prompt.kv_len
    chosen = bands.repeat_interleave(block, -1)[..., :length]
    before = torch.nn.functional.pad(chosen.int().cumsum(-1), (1, 0))
    device = prompt.q.device
    first = torch.arange(prompt.num_q_blocks, device=device)[:, None] * block
    last = (first + block).clamp(max=prompt.q_len) - 1
    key = torch.arange(prompt.num_k_blocks, device=device) * block
    # The smallest distance in a block is from its last key to its first query, the largest from its first key to its last query.
    nearest = (first + prompt.offset - key - block + 1).clamp(0, length)
    farthest = (last + prompt.offset - key + 1).clamp(0, length)
    count = before[..., farthest] - before[..., nearest]
    return count > 0
