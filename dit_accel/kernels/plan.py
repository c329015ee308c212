"""`SparsePlan`: lists of the key blocks that each query block reads, as plain data."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dit_accel.kernels import visibility
from dit_accel.kernels.geometry import Geometry, Rules
from dit_accel.kernels.lists import (
    Lists,
    block_lists,
    lists_of_width,
    prefix_lists,
    reads_freely,
    trim,
)
from dit_accel.kernels.plan_data import PlanData
from dit_accel.kernels.router import select_op  # noqa: F401 (registers the operator)
from dit_accel.kernels.router.criteria import criteria_of

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


PER_HEAD = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "skip_num_blocks",
    "skip_indices",
    "columns",
    "q_order",
)
"""Tensors of a plan that have an axis for heads."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SparsePlan(PlanData):
    """Lists of the key blocks that each query block reads exactly, stored as int32 tensors and a few numbers.

    A row is one query block of one head. The lists of a row are disjoint:

    - *full*: every key of the block is visible to every query of the row, so no element mask is needed.
    - *partial*: the block needs an element mask (ragged tail, causal diagonal, window edge, padding).
    - *skip*: the block counts as negligible for `linear_scope="marginal"`.

    `from_scores` and `from_block_mask` make plans and sort the blocks of a row into the lists.

    A leading `B` or `Hq` of 1 means that all samples or heads share the lists. In `block_sparse_attention` a plan may also
    have one set of lists for each of the `Hkv` heads of keys, which the query heads of its group share.
    """

    def to(self, device: torch.device | str) -> "SparsePlan":
        """Return the same plan with its tensors on `device`."""
        moved = {
            f.name: getattr(self, f.name).to(device)
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def for_heads(self, heads: int) -> "SparsePlan":
        """Return the same plan with lists for `heads` heads: each set of lists is repeated for the heads of its group."""
        own = self.heads
        if own == 1 or own == heads:  # compared one by one, because sizes may be symbolic
            return self
        if heads % own:
            raise ValueError(f"heads={heads}: accepted is a multiple of the plan's {own}")

        def repeated(x: Tensor | None, axis: int) -> Tensor | None:
            if x is None or x.shape[axis] == 1:
                return x
            return x.repeat_interleave(heads // own, axis)

        changes: dict[str, Any] = {
            f.name: repeated(getattr(self, f.name), 0 if f.name == "q_order" else 1)
            for f in dataclasses.fields(self)
            if f.name in PER_HEAD
        }
        return dataclasses.replace(self, **changes)

    def listed(self) -> "SparsePlan":
        """Return the same plan with every block on a list, the form that backward passes and linear branches need."""
        if not self.has_prefix_rows:
            return self
        counts, indices = lists_of_width(self.full_blocks(), self.num_k_blocks)
        return dataclasses.replace(self, full_kv_num_blocks=counts, full_kv_indices=indices)

    def equals(self, other: "SparsePlan") -> bool:
        """Return whether both plans hold the same numbers."""
        for f in dataclasses.fields(self):
            a, b = getattr(self, f.name), getattr(other, f.name)
            if isinstance(a, Tensor) and isinstance(b, Tensor):
                if not torch.equal(a, b):
                    return False
            elif a is not b and a != b:
                return False
        return True

    def __repr__(self) -> str:
        b, h, n_q, _ = self.kv_indices.shape
        mask = f"causal, q_offset={self.q_offset}" if self.causal else "not causal"
        return (
            f"SparsePlan([{b}, {h}] x {n_q} rows x {self.num_k_blocks} blocks of "
            f"{self.block_q}/{self.block_k} tokens, {self.q_len} queries, {self.kv_len} keys, "
            f"{mask}, density {self.density():.3f})"
        )

    # -- constructors --------------------------------------------------------------------------

    @classmethod
    def from_block_mask(
        cls,
        mask: Bool[Tensor, "b h n_q n_k"],
        *,
        block_q: int,
        block_k: int,
        q_len: int,
        kv_len: int,
        causal: bool = False,
        q_offset: int | None = None,
        window: int | None = None,
        sink: int = 0,
        kv_lengths: Int[Tensor, " batch"] | None = None,
        q_block_sizes: Int[Tensor, " n_q_sizes"] | None = None,
        k_block_sizes: Int[Tensor, " n_k_sizes"] | None = None,
        skip: Bool[Tensor, "b2 h2 n_q n_k"] | None = None,
        columns: Int[Tensor, "b3 h3 n_columns"] | None = None,
        q_order: Int[Tensor, "h4 l_q"] | None = None,
        long_rows: Int[Tensor, " n_long"] | None = None,
        most: int | None = None,
    ) -> "SparsePlan":
        """Return a plan that reads exactly the blocks that are True in `mask`.

        Args:
            mask: blocks to read, bool `[B|1, Hq|1, T_q, T_k]`, on any device. Blocks without a visible key are dropped.
            block_q, block_k: tokens per block, >= 1.
            q_len, kv_len: lengths in tokens; `T_q = ceil(q_len / block_q)`, `T_k = ceil(kv_len / block_k)`.
            causal: causal mask, bottom-right aligned: query i sees keys up to `i + kv_len - q_len`.
            q_offset: shift of the causal mask: query i sees keys up to `i + q_offset`. Default: `kv_len - q_len` if
                causal, else 0.
            window: number of visible keys per query, counted back from its own position. Needs `causal`.
            sink: number of first keys that the window never hides.
            kv_lengths: number of valid keys of each batch entry, `[B]`.
            q_block_sizes, k_block_sizes: number of valid tokens at the start of each block, `[T_q]` and `[T_k]`.
            skip: blocks that the linear scope "marginal" leaves out, of the shape of `mask`. Blocks that `mask` reads
                are never skipped.
            columns: single keys that every query of a head reads in addition, `[B|1, Hq|1, C]`. Strictly ascending;
                unused places at the end hold `kv_len`.
            q_order: permutation of the queries, `[Hq|1, Lq]`: row r of the blocks is query `q_order[r]`.
            long_rows: indices of query blocks that read very many keys, `[n]`. GPU kernels split them over several
                programs. Results do not change.
            most: upper bound of the blocks in a row of `mask`. Keeps the lists narrow without a device synchronisation.
                Default: `T_k`.

        Raises:
            ValueError: an argument is out of range, or shapes do not match; the message names the argument. Numbers
                inside tensors are checked on a CPU only.
        """
        geometry = Geometry.of(
            mask.device,
            block_q=block_q,
            block_k=block_k,
            q_len=q_len,
            kv_len=kv_len,
            causal=causal,
            q_offset=q_offset,
            window=window,
            sink=sink,
            kv_lengths=kv_lengths,
            q_block_sizes=q_block_sizes,
            k_block_sizes=k_block_sizes,
            columns=columns,
            q_order=q_order,
            long_rows=long_rows,
        )
        for name, x in (("mask", mask), ("skip", skip)):
            if x is not None:
                _check_blocks(name, x, block_q, block_k, q_len, kv_len)
                if x.dtype != torch.bool:
                    raise ValueError(f"{name}: dtype {x.dtype}; accepted is torch.bool")
        if most is not None and most < 1:
            raise ValueError(f"most={most}: accepted is an int >= 1")
        sizes = [("mask", *mask.shape[:2])]
        if skip is not None:
            sizes.append(("skip", *skip.shape[:2]))
        _check_leading([*sizes, *geometry.leading_sizes()])
        some, every = visibility.block_visibility(geometry)
        shape = torch.broadcast_shapes(mask.shape, some.shape)
        mask = mask.expand(shape)
        # Only few blocks of a row can be partial: those at its edges, and the last block.
        few = visibility.most_partial(geometry)
        few = most if few is None else few if most is None else torch.sym_min(most, few)
        partial = block_lists(mask & some & ~every, few)
        if geometry.long_rows is None:
            full = block_lists(mask & every, most)
        else:
            full = prefix_lists(mask & every, geometry.long_rows, most)
        skipped = None if skip is None else block_lists(skip & ~mask & some)
        bound = None if skip is not None or most is None else torch.sym_min(most, mask.shape[-1])
        return cls._with_lists(geometry, partial, full, skipped, bound)

    @classmethod
    def from_scores(
        cls,
        scores: Float[Tensor, "b h n_q n_k"],
        *,
        topk: float | None = None,
        count: int | None = None,
        top_p: float | None = None,
        threshold: float | None = None,
        skip: int | float = 0.0,
        limit: float | None = None,
        sink_blocks: int = 0,
        tail_blocks: int = 0,
        diagonal: int | None = None,
        geometry: Geometry | None = None,
        tally: Int[Tensor, "3"] | None = None,
        dense_queries: int = 0,
        **lengths_and_rules: Any,
    ) -> "SparsePlan":
        """Return a plan that keeps the best blocks of each row, at least one.

        Pass `topk` (or `count`), `top_p`, both, or `threshold`. A row is one query block of one head; n is the number
        of key blocks with a score. Among equal scores, the lower index ranks first, on every device.

        Args:
            scores: logits `[B|1, Hq|1, T_q, T_k - tail_blocks]`, for example from `block_scores`. Higher is
                better.
            topk: fraction in (0, 1]. Each row keeps its `max(1, ceil(topk * n))` best blocks.
            count: number of best blocks that each row keeps, in place of `topk`.
            top_p: softmax mass in (0, 1]. Each row keeps the fewest best blocks whose softmax weights sum
                to at least `top_p`. With `topk`, a row keeps the union of both.
            threshold: smallest score. Each row keeps every block with at least this score. Not together with `topk` or
                `top_p`.
            skip: fraction in [0, 1). The `floor(skip * n)` worst blocks of each row are negligible (the
                k_l of SLA). Used by `linear_scope="marginal"`.
            limit: fraction in (0, 1] of the n blocks, at least `topk`. `top_p` and `threshold` keep at
                most this share of a row, the best blocks. The lists are then only as wide as the limit,
                which saves kernel time; without it they are `T_k` wide on a GPU. Not with `topk` alone.
                Default: no limit.
            sink_blocks: number of first blocks that every row reads in addition.
            tail_blocks: number of last blocks, without scores, that every row reads in addition (text).
            diagonal: number of blocks on either side of a row's own position (plus `q_offset`) that the
                row reads in addition, with the blocks at that position. Default: none.
            geometry: lengths, blocks and rules, checked once and shared by several plans.
            tally: counters, int64 `[3]` on the device of the scores: number of plans, attended (query, key) pairs, and
                pairs of dense calls. The numbers of this plan are added in place, without an additional launch. Not for
                `causal` plans or plans with `columns`.
            dense_queries: number of queries of the same call that are not in the plan and read every key.
                They count in `tally` only. Default: 0.
            **lengths_and_rules: arguments in place of `geometry`: `block_q`, `block_k`, `q_len`, `kv_len`
                and, optionally, the rules of `from_block_mask` (`causal`, `kv_lengths`, ...).

        Raises:
            ValueError: an argument is out of range, or shapes do not match; the message names the argument.
        """
        if geometry is None:
            geometry = Geometry.of(scores.device, **lengths_and_rules)
        elif lengths_and_rules:
            raise ValueError(
                f"geometry: given with {', '.join(lengths_and_rules)}; accepted is geometry alone, or lengths and rules"
            )
        elif geometry.device != scores.device:
            raise ValueError(f"geometry: on {geometry.device}, but scores are on {scores.device}")
        for name, number in (("tail_blocks", tail_blocks), ("dense_queries", dense_queries)):
            if not isinstance(number, int | torch.SymInt) or number < 0:
                raise ValueError(f"{name}={number}: accepted is an int >= 0")
        g, n_k = geometry, geometry.num_k_blocks
        if tail_blocks >= n_k:
            raise ValueError(
                f"tail_blocks={tail_blocks}: accepted are fewer than the {n_k} key blocks"
            )
        n = _check_blocks("scores", scores, g.block_q, g.block_k, g.q_len, g.kv_len, tail_blocks)
        _check_leading([("scores", *scores.shape[:2]), *g.leading_sizes()])
        criteria = criteria_of(
            n,
            topk=topk,
            count=count,
            top_p=top_p,
            threshold=threshold,
            skip=skip,
            limit=limit,
            sink_blocks=sink_blocks,
            diagonal=diagonal,
        )
        if tally is not None:
            _check_tally(tally, g)
        most = criteria.most(g, n, tail_blocks)
        bound = None if most is None else most + (criteria.skip or 0)
        full = n_k if most is None else most
        lists = torch.ops.dit_accel.select_blocks(
            scores,
            g.q_block_sizes,
            g.k_block_sizes,
            g.kv_lengths,
            g.q_order,
            tally,
            g.block_q,
            g.block_k,
            g.q_len,
            g.kv_len,
            g.causal,
            g.q_offset,
            g.window,
            g.sink,
            criteria.best,
            criteria.limit,
            criteria.top_p,
            criteria.threshold,
            criteria.skip,
            criteria.sink_blocks,
            criteria.diagonal,
            full if g.ragged else 1,
            full,
            (criteria.skip or 0) + 1,  # + 1, because torch.compile treats a size of 1 as a constant
            dense_queries,
        )
        partial, kept, skipped = (Lists(*lists[i : i + 2]) for i in (0, 2, 4))
        if reads_freely(scores):
            partial, kept, skipped = trim(partial), trim(kept), trim(skipped)
        return cls._with_lists(g, partial, kept, None if criteria.skip is None else skipped, bound)

    @classmethod
    def _with_lists(
        cls, rules: Rules, partial: Lists, full: Lists, skipped: Lists | None, bound: int | None
    ) -> "SparsePlan":
        return cls(
            block_q=rules.block_q,
            block_k=rules.block_k,
            q_len=rules.q_len,
            kv_len=rules.kv_len,
            q_block_sizes=rules.q_block_sizes,
            k_block_sizes=rules.k_block_sizes,
            kv_lengths=rules.kv_lengths,
            columns=rules.columns,
            q_order=rules.q_order,
            long_rows=rules.long_rows,
            causal=rules.causal,
            q_offset=rules.q_offset,
            window=rules.window,
            sink=rules.sink,
            kv_num_blocks=partial.counts,
            kv_indices=partial.indices,
            full_kv_num_blocks=full.counts,
            full_kv_indices=full.indices,
            skip_num_blocks=None if skipped is None else skipped.counts,
            skip_indices=None if skipped is None else skipped.indices,
            row_bound=bound,
        )

    # -- meaning ---------------------------------------------------------------------------------

    def to_dense_mask(self) -> Bool[Tensor, "b h l_q l_k"]:
        """Return the mask of the keys that each query reads, `[B|1, Hq|1, Lq, Lk]`.

        The result of the kernels is defined as attention under this mask.
        """
        return visibility.pair_mask(self, self.to_block_mask(), columns=True)

    def density(self) -> float:
        """Return the share of attended (query, key) pairs, of the pairs of a dense call (causal: of the triangle)."""
        return float(self.density_tensor())

    def density_tensor(self) -> Float[Tensor, ""]:
        """Return `density` as a scalar tensor on the plan's device, without a device synchronisation."""
        return visibility.density(self)

    @torch.no_grad()
    def recall(
        self,
        q: Float[Tensor, "b h l_q d"],
        k: Float[Tensor, "b h_kv l_k d"],
        *,
        scale: float | None = None,
    ) -> Float[Tensor, "b h"]:
        """Return the share of the exact softmax mass that the plan reads, averaged over queries.

        Computed one query block at a time, in fp32 or wider.
        """
        return visibility.recall(self, q, k, scale)

    def to_flex(self) -> "BlockMask":
        """Return the plan as FlexAttention's `BlockMask`, element rules included.

        Raises:
            ValueError: the plan has `columns` or `q_order`, which a `BlockMask` cannot express.
        """
        from dit_accel.kernels import flex

        return flex.to_flex(self.listed())


torch.export.register_dataclass(SparsePlan)


def _check_leading(sizes: Iterable) -> None:
    """Raise ValueError unless all tensors have the same batch size and number of heads, or 1.

    Args:
        sizes: name, batch size and number of heads of each tensor.
    """
    for axis, what in ((1, "batch"), (2, "heads")):
        first = None
        for size in sizes:
            if size[axis] == 1:
                continue
            first = first or size
            if size[axis] != first[axis]:
                raise ValueError(
                    f"{size[0]}: {what} {size[axis]}, but {first[0]} has {first[axis]}; "
                    "accepted is 1 or the same number everywhere"
                )


def _check_tally(tally: Tensor, rules: Rules) -> None:
    if tally.dtype != torch.int64 or tuple(tally.shape) != (3,) or tally.device != rules.device:
        raise ValueError(
            f"tally: {tally.dtype} {tuple(tally.shape)} on {tally.device}; accepted is torch.int64 (3,) "
            f"on {rules.device}"
        )
    if not tally.is_contiguous():  # the kernel adds to three consecutive numbers
        raise ValueError(f"tally: stride {tally.stride(0)}; accepted is a contiguous tensor")
    if rules.positional or rules.columns is not None:
        kind = "causal" if rules.positional else "with columns"
        raise ValueError(
            f"tally: given for a plan {kind}; accepted without, because only then do blocks determine the pairs"
        )


def _check_blocks(
    name: str, x: Tensor, block_q: int, block_k: int, q_len: int, kv_len: int, tail: int = 0
) -> int:
    """Return the number of key blocks of `x` `[B|1, Hq|1, T_q, T_k - tail]` after checking its shape."""
    n_q, n_k = math.ceil(q_len / block_q), math.ceil(kv_len / block_k) - tail
    if x.ndim != 4 or tuple(x.shape[-2:]) != (n_q, n_k):
        raise ValueError(
            f"{name}: shape {tuple(x.shape)}, but {q_len} queries in blocks of {block_q} and "
            f"{kv_len} keys in blocks of {block_k} need [B|1, Hq|1, {n_q}, {n_k}]"
        )
    return n_k
