"""The lists of a plan and what follows from them alone; `SparsePlan` adds how plans are made and read."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dit_accel.kernels.lists import Lists, block_mask, check_range, transpose_lists


class ColumnLists(NamedTuple):
    """A plan read by key block: which query blocks read it, partly and in full."""

    partial: Lists
    """`[B|1, Hq|1, T_k]` counts and `[B|1, Hq|1, T_k, n]` query blocks."""
    full: Lists


@dataclass(frozen=True, eq=False, kw_only=True)
class PlanData:
    """Fields of `SparsePlan`."""

    kv_num_blocks: Int[Tensor, "b h n_q"]
    """Partial blocks per row."""
    kv_indices: Int[Tensor, "b h n_q n_partial"]
    """Their indices, ascending, in the first `kv_num_blocks` places; the rest is 0."""
    full_kv_num_blocks: Int[Tensor, "b h n_q"]
    full_kv_indices: Int[Tensor, "b h n_q n_full"]

    skip_num_blocks: Int[Tensor, "b h n_q"] | None = None
    """Blocks per row that not even the linear branch reads; None: no such class."""
    skip_indices: Int[Tensor, "b h n_q n_skip"] | None = None

    block_q: int
    """Tokens per query block."""
    block_k: int
    q_len: int
    """Tokens on the query side; the last block may be ragged."""
    kv_len: int

    q_block_sizes: Int[Tensor, " n_q"] | None = None
    """Valid tokens at the start of each query tile (ragged tiles); None: all but the tail full."""
    k_block_sizes: Int[Tensor, " n_k"] | None = None
    kv_lengths: Int[Tensor, " batch"] | None = None
    """Valid keys per batch entry (right padding); None: all."""
    columns: Int[Tensor, "b_columns h_columns n_columns"] | None = None
    """Single keys that every query of a head reads in addition, under the same rules; ascending,
    unused places at the end hold `kv_len`. A column inside a block that the row reads is read once."""
    q_order: Int[Tensor, "h_order l_q"] | None = None
    """Row r of the query blocks is query `q_order[r]`, `[Hq|1, Lq]`; None: in order."""
    long_rows: Int[Tensor, " n_long"] | None = None
    """Query blocks that read very many keys; kernels may split them. A hint: results stay the same."""
    row_bound: int | None = None
    """Most blocks that one row reads and skips together; None: not known. Kernels choose by it how the
    linear branch sums, so the choice is the same on every device."""

    causal: bool = False
    """Query i sees keys up to `i + q_offset`."""
    q_offset: int = 0
    window: int | None = None
    """Query i sees only the last `window` of those keys (and the sink)."""
    sink: int = 0
    """First keys that a window never hides."""

    # -- geometry ------------------------------------------------------------------------------

    @property
    def num_q_blocks(self) -> int:
        return math.ceil(self.q_len / self.block_q)

    @property
    def num_k_blocks(self) -> int:
        return math.ceil(self.kv_len / self.block_k)

    @property
    def device(self) -> torch.device:
        return self.kv_indices.device

    @property
    def positional(self) -> bool:
        """Whether visibility depends on the query's position, not only on the key."""
        return self.causal or self.window is not None

    def leading_sizes(self) -> Iterator[tuple[str, int, int]]:
        """Of each tensor that has them: its name, batch and heads."""
        for name in ("kv_num_blocks", "full_kv_num_blocks", "skip_num_blocks", "columns"):
            if (x := getattr(self, name)) is not None:
                yield name, x.shape[0], x.shape[1]
        if self.q_order is not None:
            yield "q_order", 1, self.q_order.shape[0]
        if self.kv_lengths is not None:
            yield "kv_lengths", self.kv_lengths.shape[0], 1

    def check_numbers(self) -> None:
        """Raise ValueError, naming the field, if a number in a tensor is out of range.

        Reads every tensor, so on a GPU it waits for the device: constructors and operators do it
        on a CPU always, elsewhere with `DIT_ACCEL_DEBUG=1` in the environment.
        """
        n_q, n_k = self.num_q_blocks, self.num_k_blocks
        for name in ("kv", "full_kv", "skip"):
            counts, indices = getattr(self, f"{name}_num_blocks"), getattr(self, f"{name}_indices")
            if counts is None:
                continue
            if counts.shape[-1] != n_q or indices.shape[:-1] != counts.shape:
                raise ValueError(
                    f"{name}_indices: shape {tuple(indices.shape)} with counts "
                    f"{tuple(counts.shape)}; accepted are [B|1, Hq|1, {n_q}, n] and the same without n"
                )
            check_range(f"{name}_num_blocks", counts, indices.shape[-1])
            check_range(f"{name}_indices", indices, n_k - 1)
        for name, most in (
            ("q_block_sizes", self.block_q),
            ("k_block_sizes", self.block_k),
            ("kv_lengths", self.kv_len),
            ("columns", self.kv_len),
            ("long_rows", n_q - 1),
        ):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), most)
        if self.columns is not None:
            step = self.columns.diff(dim=-1)
            if not bool(((step > 0) | (self.columns[..., 1:] == self.kv_len)).all()):
                raise ValueError(f"columns: accepted are ascending keys, then only {self.kv_len}")
        if self.q_order is not None:
            in_order = torch.arange(self.q_len, dtype=torch.int32, device=self.device)
            if not bool((self.q_order.sort(-1).values == in_order).all()):
                raise ValueError(f"q_order: not a permutation of the {self.q_len} queries")

    def k_sizes(self) -> Int[Tensor, "b n_k"]:
        """Valid keys in each key block, `[B|1, T_k]` (tail, ragged tiles and `kv_lengths` applied)."""
        sizes = _block_sizes(
            self.k_block_sizes, self.num_k_blocks, self.block_k, self.kv_len, self.device
        )
        if self.kv_lengths is None:
            return sizes[None]
        starts = (
            torch.arange(self.num_k_blocks, device=self.device, dtype=torch.int32) * self.block_k
        )
        return torch.minimum(sizes, (self.kv_lengths[:, None] - starts).clamp(min=0))

    def q_sizes(self) -> Int[Tensor, " n_q"]:
        """Valid queries in each query block, `[T_q]`."""
        return _block_sizes(
            self.q_block_sizes, self.num_q_blocks, self.block_q, self.q_len, self.device
        )

    def visible(self, q_pos: Int[Tensor, "*q"], k_pos: Int[Tensor, "*k"]) -> Bool[Tensor, "*o"]:
        """Causal, window and sink rule for broadcast token positions (not block membership)."""
        last = q_pos + self.q_offset
        seen = k_pos <= last if self.causal else torch.ones_like(k_pos <= last)
        if self.window is not None:
            seen = seen & ((k_pos > last - self.window) | (k_pos < self.sink))
        return seen

    def to_block_mask(self) -> Bool[Tensor, "b h n_q n_k"]:
        """Which blocks are read, `[B|1, Hq|1, T_q, T_k]`."""
        n_k = self.num_k_blocks
        return block_mask(self.kv_num_blocks, self.kv_indices, n_k) | block_mask(
            self.full_kv_num_blocks, self.full_kv_indices, n_k
        )

    def linear_blocks(self, linear_scope: str) -> Bool[Tensor, "b h n_q n_k"]:
        """Which blocks the linear branch sums over, `[B|1, Hq|1, T_q, T_k]`.

        "all": every block; "complement": those not read; "marginal": those neither read nor skipped.
        """
        read = self.to_block_mask()
        if linear_scope == "all":
            return torch.ones_like(read)
        if linear_scope == "marginal" and self.skip_num_blocks is not None:
            assert self.skip_indices is not None
            skipped = block_mask(self.skip_num_blocks, self.skip_indices, self.num_k_blocks)
            return ~(read | skipped)
        return ~read

    def transpose(self) -> ColumnLists:
        """The plan by key block: which query blocks read it. Backward walks these lists."""
        n_k = self.num_k_blocks
        return ColumnLists(
            partial=transpose_lists(self.kv_num_blocks, self.kv_indices, n_k),
            full=transpose_lists(self.full_kv_num_blocks, self.full_kv_indices, n_k),
        )


def _block_sizes(
    given: Tensor | None, n: int, block: int, length: int, device: torch.device
) -> Tensor:
    starts = torch.arange(n, device=device, dtype=torch.int32) * block
    sizes = (length - starts).clamp(max=block)
    return sizes if given is None else torch.minimum(sizes, given)
