"""Operator `dit_accel::select_blocks`: makes block lists from scores, in one launch on a GPU."""

from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels import visibility
from dit_accel.kernels.geometry import Geometry, Rules
from dit_accel.kernels.launch import runs_here
from dit_accel.kernels.lists import Lists
from dit_accel.kernels.operators import operator
from dit_accel.kernels.router.criteria import Criteria
from dit_accel.kernels.router.select import select_in_torch

Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _empty_lists(
    scores: Tensor,
    q_block_sizes: Tensor | None,
    k_block_sizes: Tensor | None,
    kv_lengths: Tensor | None,
    q_order: Tensor | None,
    *rest: Any,
) -> Found:
    """Return empty counts and indices of the partial, full and skip lists. Skip lists have size 0 without `skip`."""
    *_, skip, _, _, w_part, w_full, w_skip, _ = rest
    batch, heads, n_q, _ = scores.shape
    # A leading size of 1: all samples or heads share the lists.
    if kv_lengths is not None and batch == 1:
        batch = kv_lengths.shape[0]
    if q_order is not None and heads == 1:
        heads = q_order.shape[0]
    shapes: list[tuple[int, ...]] = [(batch, heads, n_q), (batch, heads, n_q, w_part)]
    shapes += [(batch, heads, n_q), (batch, heads, n_q, w_full)]
    shapes += [(0,), (0,)] if skip is None else [(batch, heads, n_q), (batch, heads, n_q, w_skip)]
    a, b, c, d, e, f = (scores.new_empty(shape, dtype=torch.int32) for shape in shapes)
    return a, b, c, d, e, f


@operator("select_blocks", _empty_lists, mutates=("tally",))
def _select_blocks(
    scores: Tensor,
    q_block_sizes: Tensor | None,
    k_block_sizes: Tensor | None,
    kv_lengths: Tensor | None,
    q_order: Tensor | None,
    tally: Tensor | None,
    block_q: int,
    block_k: int,
    q_len: int,
    kv_len: int,
    causal: bool,
    q_offset: int,
    window: int | None,
    sink: int,
    best: int,
    limit: int | None,
    top_p: float | None,
    threshold: float | None,
    skip: int | None,
    sink_blocks: int,
    diagonal: int | None,
    w_part: int,
    w_full: int,
    w_skip: int,
    dense_queries: int,
) -> Found:
    rules = Geometry(
        block_q=block_q,
        block_k=block_k,
        q_len=q_len,
        kv_len=kv_len,
        q_block_sizes=q_block_sizes,
        k_block_sizes=k_block_sizes,
        kv_lengths=kv_lengths,
        q_order=q_order,
        causal=causal,
        q_offset=q_offset,
        window=window,
        sink=sink,
        _device=scores.device,
    )
    criteria = Criteria(best, limit, top_p, threshold, skip, sink_blocks, diagonal)
    if not _fits(scores, rules):
        widths = w_part, w_full, w_skip
        partial, full, skipped = select_in_torch(
            scores, rules, criteria, widths, tally, dense_queries
        )
        skipped = skipped or Lists(*(scores.new_empty(0, dtype=torch.int32) for _ in range(2)))
        return (*partial, *full, *skipped)
    from dit_accel.kernels.router.select_kernel import select_launch

    widths_and_more = skip, sink_blocks, diagonal, w_part, w_full, w_skip, dense_queries
    tensors = q_block_sizes, k_block_sizes, kv_lengths, q_order
    found = _empty_lists(scores, *tensors, *widths_and_more)
    select_launch(
        scores.float().contiguous(),
        rules,
        criteria,
        Lists(*found[:2]),
        Lists(*found[2:4]),
        None if skip is None else Lists(*found[4:]),
        row_ends=_row_ends(rules),
        tally=tally,
        dense_queries=dense_queries,
    )()
    return found


def _fits(scores: Tensor, rules: Rules) -> bool:
    if not runs_here(scores):
        return False
    from dit_accel.kernels.router.select_kernel import MOST_BLOCKS

    return rules.num_k_blocks <= MOST_BLOCKS


def _row_ends(rules: Rules) -> tuple[Tensor, Tensor] | None:
    """Return the row ends for plans with `q_order`, or None without: the kernel computes them then."""
    if rules.q_order is None:
        return None
    first, last = visibility.row_ends(rules)
    return first.to(torch.int32), last.to(torch.int32)
