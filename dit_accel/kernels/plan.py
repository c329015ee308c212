"""`SparsePlan`: which key blocks each query block reads, as plain data."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dit_accel.kernels import visibility
from dit_accel.kernels.lists import block_lists, reads_freely
from dit_accel.kernels.plan_data import PlanData
from dit_accel.kernels.router.select import select_blocks, topk_blocks

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, eq=False, kw_only=True)
class SparsePlan(PlanData):
    """Which key blocks every query block reads exactly; int32 tensors and a few numbers.

    The lists of a row are disjoint. A block on the *full* list needs no element mask: every
    key in it is visible to every query of the row. A block on the *partial* list does (ragged
    tail, causal diagonal, window edge, padding). A block on the *skip* list counts as negligible
    for `linear_scope="marginal"`. Build plans with `from_scores` or `from_block_mask`, which sort
    the blocks of a row into the lists.

    A leading `B` or `Hq` of 1 means "the same for all".
    """

    def to(self, device: torch.device | str) -> "SparsePlan":
        """The same plan with its tensors on `device`."""
        moved = {
            f.name: getattr(self, f.name).to(device)
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def equals(self, other: "SparsePlan") -> bool:
        """Whether both plans hold the same numbers."""
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
        """A plan that reads exactly the blocks that are True in `mask`.

        Args:
            mask: `[B|1, Hq|1, T_q, T_k]`, on any device. Blocks without a visible key are dropped.
            block_q, block_k: tokens per block, >= 1.
            q_len, kv_len: lengths in tokens; `T_q = ceil(q_len / block_q)`, `T_k` likewise.
            causal: bottom-right aligned: query i sees keys up to `i + kv_len - q_len`.
            q_offset: overrides that shift. Default: `kv_len - q_len` when causal, else 0.
            window: visible keys per query, counted back from its own position; needs `causal`.
            sink: first keys that the window never hides.
            kv_lengths: `[B]`, valid keys per batch entry.
            q_block_sizes, k_block_sizes: `[T_q]`, `[T_k]`, valid tokens at the start of each tile.
            skip: as `mask`: blocks that the linear scope "marginal" leaves out. What `mask` reads
                is never skipped.
            columns: `[B|1, Hq|1, C]`, single keys that every query of a head reads too; strictly
                ascending, unused places at the end hold `kv_len`.
            q_order: `[Hq|1, Lq]`, a permutation: row r of the blocks is query `q_order[r]`.
            long_rows: `[n]`, query blocks that read very many keys, which GPU kernels then split
                over several programs. Changes no result.
            most: a row of `mask` holds at most this many blocks; keeps the lists narrow where
                counting would stall the device. Default: no limit is known.

        Raises:
            ValueError: an argument is out of range or shapes do not match; it names the argument.
                Numbers inside tensors are checked on a CPU only.
        """
        plan = cls._rules(
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
        _check_leading([*sizes, *plan.leading_sizes()])
        some, every = visibility.block_visibility(plan)
        shape = torch.broadcast_shapes(mask.shape, some.shape)
        mask = mask.expand(shape)
        # Where only the tail can be short of keys, one partial block a row is the most there is.
        ragged = plan.positional or k_block_sizes is not None or kv_lengths is not None
        partial = block_lists(mask & some & ~every, most if ragged else 1)
        full = block_lists(mask & every, most)
        skipped = None if skip is None else block_lists(skip & ~mask & some)
        return dataclasses.replace(
            plan,
            kv_num_blocks=partial.counts,
            kv_indices=partial.indices,
            full_kv_num_blocks=full.counts,
            full_kv_indices=full.indices,
            skip_num_blocks=None if skipped is None else skipped.counts,
            skip_indices=None if skipped is None else skipped.indices,
        )

    @classmethod
    def from_scores(
        cls,
        scores: Float[Tensor, "b h n_q n_k"],
        *,
        block_q: int,
        block_k: int,
        q_len: int,
        kv_len: int,
        topk: float | None = None,
        top_p: float | None = None,
        threshold: float | None = None,
        skip: int | float = 0.0,
        sink_blocks: int = 0,
        tail_blocks: int = 0,
        diagonal: int | None = None,
        causal: bool = False,
        **geometry,
    ) -> "SparsePlan":
        """A plan that keeps the best blocks of each row, at least one.

        Args:
            scores: `[B|1, Hq|1, T_q, T_k - tail_blocks]`, logits (see `block_scores`); higher is
                better.
            topk: fraction in (0, 1]: the `max(1, ceil(topk * n))` best of the n blocks with a score,
                in each row.
            top_p: in (0, 1]: the fewest best blocks whose softmax weights sum to at least `top_p`.
                With `topk` too: the union of both.
            threshold: keeps every block whose score is at least this (alone).
            skip: fraction in [0, 1): the `floor(skip * n)` worst blocks of each row are negligible
                (the k_l of SLA); for `linear_scope="marginal"`.
            sink_blocks: first blocks that every row reads in addition.
            tail_blocks: last blocks, without scores, that every row reads in addition (text).
            diagonal: every row also reads the blocks at its own positions (plus `q_offset`) and
                this many on either side. Default: none.
            block_q, block_k, q_len, kv_len, causal, **geometry: as in `from_block_mask`.

        Ties go to the lower index, on every device.
        """
        for name, number in (
            ("sink_blocks", sink_blocks),
            ("tail_blocks", tail_blocks),
            ("diagonal", diagonal),
        ):
            if number is not None and number < 0:
                raise ValueError(f"{name}={number}: accepted is an int >= 0")
        geometry.update(block_q=block_q, block_k=block_k, q_len=q_len, kv_len=kv_len, causal=causal)
        rules = cls._rules(scores.device, **geometry)
        n_k = _check_blocks("scores", scores, block_q, block_k, q_len, kv_len, tail_blocks)
        forced, extra = None, tail_blocks
        if sink_blocks or diagonal is not None:
            block = torch.arange(n_k, device=scores.device)
            forced, extra = (
                (block < sink_blocks).expand(1, 1, scores.shape[2], -1),
                extra + sink_blocks,
            )
            if diagonal is not None:
                first, last = (
                    x.div(block_k, rounding_mode="floor")[..., None]
                    for x in visibility.row_ends(rules)
                )
                near = (block >= first - diagonal) & (block <= last + diagonal)
                forced = forced | near[None]
                extra += 2 * diagonal + 1 + math.ceil(block_q / block_k)
                extra = n_k + tail_blocks if rules.q_order is not None else extra
        # A block that nobody may read must not use up a place among the best.
        open_blocks = visibility.block_visibility(rules)[0][..., :n_k]
        kept, skipped = select_blocks(
            scores,
            open_blocks,
            topk=topk,
            top_p=top_p,
            threshold=threshold,
            skip=skip,
            forced=forced,
        )
        if tail_blocks:
            kept = torch.nn.functional.pad(kept, (0, tail_blocks), value=True)
            if skipped is not None:
                skipped = torch.nn.functional.pad(skipped, (0, tail_blocks))
        most = None
        if topk is not None and top_p is None:
            most = topk_blocks(topk, n_k) + extra
        return cls.from_block_mask(kept, skip=skipped, most=most, **geometry)

    @classmethod
    def _rules(
        cls,
        device: torch.device,
        *,
        block_q: int,
        block_k: int,
        q_len: int,
        kv_len: int,
        causal: bool = False,
        q_offset: int | None = None,
        window: int | None = None,
        sink: int = 0,
        kv_lengths: Tensor | None = None,
        q_block_sizes: Tensor | None = None,
        k_block_sizes: Tensor | None = None,
        columns: Tensor | None = None,
        q_order: Tensor | None = None,
        long_rows: Tensor | None = None,
    ) -> "SparsePlan":
        """A checked plan that reads nothing yet: who may see what follows from it."""
        for name, value in (
            ("block_q", block_q),
            ("block_k", block_k),
            ("q_len", q_len),
            ("kv_len", kv_len),
        ):
            if not isinstance(value, int | torch.SymInt) or value < 1:
                raise ValueError(f"{name}={value!r}: accepted is an int >= 1")
        if window is not None and (not isinstance(window, int) or window < 1 or not causal):
            raise ValueError(f"window={window}: accepted is an int >= 1 together with causal=True")
        if sink < 0 or (sink and window is None):
            raise ValueError(f"sink={sink}: accepted is an int >= 0, above 0 only with a window")
        for name, x in (
            ("kv_lengths", kv_lengths),
            ("q_block_sizes", q_block_sizes),
            ("k_block_sizes", k_block_sizes),
            ("columns", columns),
            ("q_order", q_order),
            ("long_rows", long_rows),
        ):
            if x is not None and (
                not isinstance(x, Tensor) or x.is_floating_point() or x.dtype == torch.bool
            ):
                kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"{name}: {kind}; accepted is a tensor of integers")
        if causal and (q_block_sizes is not None or k_block_sizes is not None):
            raise ValueError(
                "causal=True: ragged tiles have no causal order; leave *_block_sizes out"
            )
        if q_order is not None and q_block_sizes is not None:
            raise ValueError("q_order: not together with q_block_sizes; order the tiles instead")
        n_q, n_k = math.ceil(q_len / block_q), math.ceil(kv_len / block_k)

        def to_int32(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device=device, dtype=torch.int32)

        plan = cls(
            **dict.fromkeys(
                ("kv_num_blocks", "full_kv_num_blocks"),
                torch.zeros(1, 1, n_q, dtype=torch.int32, device=device),
            ),
            **dict.fromkeys(
                ("kv_indices", "full_kv_indices"),
                torch.zeros(1, 1, n_q, 1, dtype=torch.int32, device=device),
            ),
            block_q=block_q,
            block_k=block_k,
            q_len=q_len,
            kv_len=kv_len,
            q_block_sizes=to_int32(q_block_sizes),
            k_block_sizes=to_int32(k_block_sizes),
            kv_lengths=to_int32(kv_lengths),
            columns=to_int32(columns),
            q_order=to_int32(q_order),
            long_rows=to_int32(long_rows),
            causal=causal,
            q_offset=q_offset if q_offset is not None else (kv_len - q_len if causal else 0),
            window=window,
            sink=sink,
        )
        for name, sizes, n in (
            ("q_block_sizes", plan.q_block_sizes, n_q),
            ("k_block_sizes", plan.k_block_sizes, n_k),
        ):
            if sizes is not None and tuple(sizes.shape) != (n,):
                raise ValueError(
                    f"{name}: shape {tuple(sizes.shape)}; accepted are {n} sizes, one per block"
                )
        if plan.kv_lengths is not None and plan.kv_lengths.ndim != 1:
            raise ValueError(f"kv_lengths: shape {tuple(plan.kv_lengths.shape)}; accepted is [B]")
        if plan.columns is not None and plan.columns.ndim != 3:
            raise ValueError(
                f"columns: shape {tuple(plan.columns.shape)}; accepted is [B|1, Hq|1, C]"
            )
        if plan.q_order is not None and (
            plan.q_order.ndim != 2 or plan.q_order.shape[1] != plan.q_len
        ):
            raise ValueError(
                f"q_order: shape {tuple(plan.q_order.shape)}; accepted is [Hq|1, {q_len}]"
            )
        if reads_freely(plan.kv_indices):
            plan.check_numbers()
        return plan

    # -- what it means ---------------------------------------------------------------------------

    def to_dense_mask(self) -> Bool[Tensor, "b h l_q l_k"]:
        """Which keys each query reads, `[B|1, Hq|1, Lq, Lk]`: the definition the kernels follow."""
        return visibility.pair_mask(self, self.to_block_mask(), columns=True)

    def density(self) -> float:
        """Attended (query, key) pairs over the pairs a dense call computes (causal: the triangle)."""
        return float(self.density_tensor())

    def density_tensor(self) -> Float[Tensor, ""]:
        """`density` as a scalar tensor on the plan's device, so that nothing waits for it."""
        return visibility.density(self)

    @torch.no_grad()
    def recall(
        self,
        q: Float[Tensor, "b h l_q d"],
        k: Float[Tensor, "b h_kv l_k d"],
        *,
        scale: float | None = None,
    ) -> Float[Tensor, "b h"]:
        """Share of the exact softmax mass that the plan reads, averaged over queries.

        Computed one query block at a time, in fp32 or wider.
        """
        return visibility.recall(self, q, k, scale)

    def to_flex(self) -> "BlockMask":
        """The plan as FlexAttention's `BlockMask`, element rules included (`torch >= 2.5`).

        Raises:
            ValueError: for plans that a `BlockMask` cannot say: `columns`, `q_order`.
        """
        from dit_accel.kernels import flex

        return flex.to_flex(self)


torch.export.register_dataclass(SparsePlan)


def _check_leading(sizes: Iterable) -> None:
    """Names, batches and heads: every batch is 1 or the same number, and so are the heads."""
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


def _check_blocks(
    name: str, x: Tensor, block_q: int, block_k: int, q_len: int, kv_len: int, tail: int = 0
) -> int:
    """How many key blocks `x` `[B|1, Hq|1, T_q, T_k - tail]` has to name."""
    n_q, n_k = math.ceil(q_len / block_q), math.ceil(kv_len / block_k) - tail
    if x.ndim != 4 or tuple(x.shape[-2:]) != (n_q, n_k):
        raise ValueError(
            f"{name}: shape {tuple(x.shape)}, but {q_len} queries in blocks of {block_q} and "
            f"{kv_len} keys in blocks of {block_k} need [B|1, Hq|1, {n_q}, {n_k}]"
        )
    return n_k
