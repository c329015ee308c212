"""`PlanData`: lists of a plan, and their properties. `SparsePlan` adds constructors."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dit_accel.kernels.geometry import Rules
from dit_accel.kernels.lists import (
    Lists,
    block_lists,
    block_mask,
    check_range,
    transpose_lists,
)


class ColumnLists(NamedTuple):
    """Transposed plan: the query blocks that read each key block, partly and in full."""

    partial: Lists
    """`[B|1, Hq|1, T_k]` counts and `[B|1, Hq|1, T_k, n]` query blocks."""
    full: Lists


@dataclass(frozen=True, eq=False, kw_only=True)
class PlanData(Rules):
    """Fields of `SparsePlan`."""

    kv_num_blocks: Int[Tensor, "b h n_q"]
    """Number of partial blocks of each row. A block without a valid key is on no list."""
    kv_indices: Int[Tensor, "b h n_q n_partial"]
    """Indices of the partial blocks, ascending, in the first `kv_num_blocks` places; the rest is 0."""
    full_kv_num_blocks: Int[Tensor, "b h n_q"]
    full_kv_indices: Int[Tensor, "b h n_q n_full"]
    """Indices of the full blocks, like `kv_indices`. A row of `long_rows` whose count exceeds the width of these lists has
    no list: it reads the blocks 0 to count - 1."""

    skip_num_blocks: Int[Tensor, "b h n_q"] | None = None
    """Number of blocks of each row that not even the linear branch reads. None: no skip lists."""
    skip_indices: Int[Tensor, "b h n_q n_skip"] | None = None

    row_bound: int | None = None
    """Upper bound of the blocks that one row reads and skips together. None: unknown. It determines how the linear branch
    sums, so that every device sums in the same way."""

    @property
    def device(self) -> torch.device:
        return self.kv_indices.device

    @property
    def heads(self) -> int:
        """Number of heads that have their own lists. 1: all heads share the lists."""
        return max(heads for _, _, heads in self.leading_sizes())

    def leading_sizes(self) -> Iterator[tuple[str, int, int]]:
        """Return name, batch size and number of heads of each tensor with these axes."""
        for name in ("kv_num_blocks", "full_kv_num_blocks", "skip_num_blocks"):
            if (x := getattr(self, name)) is not None:
                yield name, x.shape[0], x.shape[1]
        yield from super().leading_sizes()

    @property
    def has_prefix_rows(self) -> bool:
        """True if the plan may have rows without a list of full blocks, which read the first blocks (`long_rows`)."""
        return self.long_rows is not None and self.full_kv_indices.shape[-1] < self.num_k_blocks

    def check_numbers(self) -> None:
        """Raise ValueError if a number in a tensor is out of range; the message names the field.

        Reads every tensor, so a GPU call waits for the device. Operators call it on a CPU, and on other devices only
        with the environment variable `DIT_ACCEL_DEBUG=1`.
        """
        n_q, n_k = self.num_q_blocks, self.num_k_blocks
        for name in ("kv", "full_kv", "skip"):
            counts, indices = getattr(self, f"{name}_num_blocks"), getattr(self, f"{name}_indices")
            if counts is None:
                continue
            if counts.shape[-1] != n_q or indices.shape[:-1] != counts.shape:
                raise ValueError(
                    f"{name}_indices: shape {tuple(indices.shape)} with counts "
                    f"{tuple(counts.shape)}; accepted are [B|1, Hq|1, {n_q}, n] and [B|1, Hq|1, {n_q}]"
                )
            if name == "full_kv" and self.long_rows is not None:
                check_range("long_rows", self.long_rows, n_q - 1)
                check_range("full_kv_num_blocks", counts, n_k)
                counts = counts.index_fill(-1, self.long_rows.long(), 0)
            check_range(f"{name}_num_blocks", counts, indices.shape[-1])
            check_range(f"{name}_indices", indices, n_k - 1)
        super().check_numbers()
        if self.k_block_sizes is not None or self.kv_lengths is not None:
            for name in ("kv", "full_kv", "skip"):
                if getattr(self, f"{name}_num_blocks") is not None:
                    self._check_listed(name)

    def _check_listed(self, name: str) -> None:
        """Raise ValueError if a list names an empty block, or the full list one with missing keys."""
        counts, indices = getattr(self, f"{name}_num_blocks"), getattr(self, f"{name}_indices")
        sizes = self.k_sizes()
        batch = max(len(sizes), len(indices))
        flat = indices.expand(batch, -1, -1, -1).flatten(1).long()
        found = sizes.expand(batch, -1).gather(1, flat).view(batch, *indices.shape[1:])
        listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
        least = self.block_k if name == "full_kv" else 1
        if bool((listed & (found < least)).any()):
            raise ValueError(
                f"{name}_indices: names a block with fewer than {least} valid keys (k_block_sizes, kv_lengths); "
                f"accepted are blocks with at least {least}"
            )

    def to_block_mask(self) -> Bool[Tensor, "b h n_q n_k"]:
        """Return the mask of blocks that are read, `[B|1, Hq|1, T_q, T_k]`."""
        n_k = self.num_k_blocks
        return block_mask(self.kv_num_blocks, self.kv_indices, n_k) | self.full_blocks()

    def full_blocks(self) -> Bool[Tensor, "b h n_q n_k"]:
        """Return the mask of blocks on the full lists, `[B|1, Hq|1, T_q, T_k]`."""
        counts, indices = self.full_kv_num_blocks, self.full_kv_indices
        return block_mask(counts, indices, self.num_k_blocks, prefix=self.has_prefix_rows)

    def linear_blocks(self, linear_scope: str) -> Bool[Tensor, "b h n_q n_k"]:
        """Return the mask of blocks that the linear branch sums over, `[B|1, Hq|1, T_q, T_k]`.

        "all": every block. "complement": blocks that are not read. "marginal": blocks that are neither read nor skipped.
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
        """Return the lists of query blocks that read each key block. The backward pass reads them."""
        n_k = self.num_k_blocks
        return ColumnLists(
            partial=transpose_lists(self.kv_num_blocks, self.kv_indices, n_k),
            full=block_lists(self.full_blocks().mT),
        )
