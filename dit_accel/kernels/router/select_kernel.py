"""Triton kernel of the selection: one program writes the lists of one row.

The kernel finds the best n blocks of a row by bisecting the bits of the n-th best score, without a sort. The order of the
bits is the order of the scores. select.py is the reference implementation.
"""

import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.geometry import Rules
from dit_accel.kernels.launch import Launch
from dit_accel.kernels.lists import Lists
from dit_accel.kernels.router.criteria import MASS_BITS, Criteria
from dit_accel.kernels.router.select import WEIGHT_BITS

# Largest number of blocks of a row; more do not fit in the registers of one program.
MOST_BLOCKS = 8192
WEIGHT_UNIT = tl.constexpr(1 << WEIGHT_BITS)
MASS_UNIT = tl.constexpr(1 << MASS_BITS)
NUMBERS = (
    "s_b", "s_h", "order_h", "length_b", "n_k", "n_scores", "q_len", "kv_len", "q_offset", "window",
    "sink", "n_best", "limit", "n_skip", "mass", "threshold", "sink_blocks", "diagonal", "w_part", "w_full",
    "w_skip", "dense_queries",
)  # fmt: skip


@triton.jit
def _floor_div(x, n):
    return tl.where(x >= 0, x // n, -((n - 1 - x) // n))


@triton.jit
def _cut(key, weight, goal):
    """Return the largest t for which the weights of the keys >= t sum to at least the goal."""
    t = tl.where(tl.sum(tl.where(key >= 0, weight, 0), 0) >= goal, 0, -2147483648)
    for i in range(31):
        candidate = t | (1 << (30 - i))
        reached = tl.sum(tl.where(key >= candidate, weight, 0), 0) >= goal
        t = tl.where(reached, candidate, t)
    return t


@triton.jit
def _best(key, n):
    """Return the mask of the n largest keys. Among equal keys, the lower index ranks first."""
    t = _cut(key, 1, n)
    above, tie = key > t, key == t
    room = n - tl.sum(above.to(tl.int32), 0)
    return above | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= room))


@triton.jit
def _reaching(key, score, is_open, mass):
    """Return the number of best blocks whose softmax weights reach the mass, in units of 1 / MASS_UNIT."""
    score = tl.where(is_open & (score == score), score, float("-inf"))  # NaN has weight 0
    top = tl.max(score, 0)
    weight = tl.where(score == top, 1.0, tl.exp(score - tl.where(top > float("-inf"), top, 0.0)))
    weight = tl.where(score > float("-inf"), weight, 0.0)
    weight = (weight * WEIGHT_UNIT + 0.5).to(tl.int32).to(tl.int64)
    goal = (tl.sum(weight, 0) * mass + MASS_UNIT - 1) // MASS_UNIT
    t = _cut(key, weight, goal)
    above, tie = key > t, key == t
    before = tl.sum(tl.where(above, weight, 0), 0) + (tl.cumsum(tie.to(tl.int32), 0) - 1) * weight
    return tl.sum((above | (tie & is_open & (before < goal))).to(tl.int32), 0)


@triton.jit
def _write(NUM, INDEX, row, mask, width, o):
    """Write the list of the True entries, ascending, and their number. Unused places hold 0."""
    n = tl.sum(mask.to(tl.int32), 0)
    place = tl.cumsum(mask.to(tl.int32), 0) - 1
    tl.store(NUM + row, n)
    tl.store(INDEX + row * width + place, o, mask=mask & (place < width))
    tl.store(INDEX + row * width + o, 0, mask=(o >= n) & (o < width))


@triton.jit(do_not_specialize=NUMBERS)
def select_kernel(
    SCORES, PART_NUM, PART_INDEX, FULL_NUM, FULL_INDEX, SKIP_NUM, SKIP_INDEX,
    Q_SIZES, K_SIZES, KV_LENGTHS, FIRST, LAST, TALLY,
    s_b, s_h, order_h, length_b, n_k, n_scores, q_len, kv_len, q_offset, window, sink,
    n_best, limit, n_skip, mass, threshold, sink_blocks, diagonal, w_part, w_full, w_skip, dense_queries,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, NP: tl.constexpr,
    TOP_P: tl.constexpr, THRESHOLD: tl.constexpr, DIAGONAL: tl.constexpr,
    POSITIONAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    i_q, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_q, n_h = tl.num_programs(0), tl.num_programs(1)
    row = (i_b * n_h + i_h).to(tl.int64) * n_q + i_q
    o = tl.arange(0, NP)
    # Visible blocks, as in visibility.block_visibility.
    q_size = tl.minimum(BLOCK_Q, q_len - i_q * BLOCK_Q)
    if Q_SIZES is not None:
        q_size = tl.minimum(q_size, tl.load(Q_SIZES + i_q))
    k_first = o * BLOCK_K
    k_size = tl.minimum(BLOCK_K, kv_len - k_first)
    if K_SIZES is not None:
        k_size = tl.minimum(k_size, tl.load(K_SIZES + o, mask=o < n_k, other=0))
    if KV_LENGTHS is not None:
        k_size = tl.minimum(k_size, tl.load(KV_LENGTHS + i_b * length_b) - k_first)
    k_size = tl.where(o < n_k, tl.maximum(k_size, 0), 0)
    seen = tl.where(q_size > 0, k_size, 0)
    some, every = seen > 0, seen == BLOCK_K
    if FIRST is not None:
        first = tl.load(FIRST + i_h * order_h + i_q)
        last = tl.load(LAST + i_h * order_h + i_q)
    else:
        first = i_q * BLOCK_Q + q_offset
        last = tl.minimum((i_q + 1) * BLOCK_Q, q_len) - 1 + q_offset
    if POSITIONAL:
        k_last = k_first + k_size - 1
        some = some & (k_first <= last)
        every = every & (k_last <= first)
        if WINDOW:
            some = some & ((k_last > first - window) | (k_first < sink))
            every = every & ((k_first > last - window) | (k_last < sink))
    is_open = some & (o < n_scores)
    # Integers with the order of the scores. A block without a visible key is the smallest.
    p_s = SCORES + i_b.to(tl.int64) * s_b + i_h.to(tl.int64) * s_h + i_q.to(tl.int64) * n_scores
    score = tl.load(p_s + o, mask=o < n_scores, other=float("-inf"))
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(score != score, 0x7FFFFFFF, key)
    key = tl.where(is_open, key, -2147483648)
    # Every criterion keeps the best n blocks of a row; criteria differ in n.
    n = n_best
    if TOP_P:
        n = tl.maximum(n, _reaching(key, score, is_open, mass))
    if THRESHOLD:
        n = tl.maximum(n, tl.sum((is_open & (score >= threshold)).to(tl.int32), 0))
    kept = is_open & _best(key, tl.minimum(n, limit))
    kept = kept | (is_open & (o < sink_blocks))
    if DIAGONAL:
        near = o >= _floor_div(first, BLOCK_K) - diagonal
        near = near & (o <= _floor_div(last, BLOCK_K) + diagonal)
        kept = kept | (is_open & near)
    if SKIP_NUM is not None:
        n_open = tl.sum(is_open.to(tl.int32), 0)
        rest = kept | _best(key, n_open - n_skip)
        skipped = is_open & (rest == 0)
        _write(SKIP_NUM, SKIP_INDEX, row, skipped, w_skip, o)
    kept = kept | (some & (o >= n_scores))
    _write(FULL_NUM, FULL_INDEX, row, kept & every, w_full, o)
    _write(PART_NUM, PART_INDEX, row, kept & (every == 0), w_part, o)
    if TALLY is not None:
        pairs = tl.maximum(q_size, 0).to(tl.int64)
        attended = pairs * tl.sum(tl.where(kept, k_size, 0), 0)
        extra = tl.where(i_q == 0, dense_queries, 0).to(tl.int64)
        keys = tl.sum(k_size, 0)
        tl.atomic_add(TALLY + 1, attended + extra * keys, sem="relaxed")
        tl.atomic_add(TALLY + 2, (pairs + extra) * keys, sem="relaxed")
        if row == 0:
            tl.atomic_add(TALLY, 1, sem="relaxed")


def select_launch(
    scores: Tensor,
    rules: Rules,
    criteria: Criteria,
    partial: Lists,
    full: Lists,
    skipped: Lists | None,
    *,
    row_ends: tuple[Tensor, Tensor] | None = None,
    tally: Tensor | None = None,
    dense_queries: int = 0,
) -> Launch:
    """Return the launch that fills the lists, which have the leading sizes of the plan.

    Args:
        scores: fp32 `[B|1, Hq|1, T_q, n]`, contiguous along the last two axes.
        rules: lengths, blocks and visibility rules. `row_ends` stands in for its `q_order`.
        row_ends: result of `visibility.row_ends`, int32 `[Hq|1, T_q]`; None: queries are in order.
        tally: counters, int64 `[3]`; see `SparsePlan.from_scores`.
    """
    batch, heads, n_q = full.counts.shape
    n_scores, n_k = scores.shape[3], rules.num_k_blocks
    c, first = criteria, None if row_ends is None else row_ends[0]
    size = max(16, 1 << (n_k - 1).bit_length())
    return Launch(
        kernel=select_kernel,
        grid=(n_q, heads, batch),
        arguments={
            "SCORES": scores,
            "PART_NUM": partial.counts,
            "PART_INDEX": partial.indices,
            "FULL_NUM": full.counts,
            "FULL_INDEX": full.indices,
            "SKIP_NUM": None if skipped is None else skipped.counts,
            "SKIP_INDEX": None if skipped is None else skipped.indices,
            "Q_SIZES": rules.q_block_sizes,
            "K_SIZES": rules.k_block_sizes,
            "KV_LENGTHS": rules.kv_lengths,
            "FIRST": first,
            "LAST": None if row_ends is None else row_ends[1],
            "TALLY": tally,
            "s_b": scores.stride(0) if scores.shape[0] > 1 else 0,
            "s_h": scores.stride(1) if scores.shape[1] > 1 else 0,
            "order_h": n_q if first is not None and len(first) > 1 else 0,
            "length_b": 1 if rules.kv_lengths is not None and len(rules.kv_lengths) > 1 else 0,
            "n_k": n_k,
            "n_scores": n_scores,
            "q_len": rules.q_len,
            "kv_len": rules.kv_len,
            "q_offset": rules.q_offset,
            "window": rules.window or 0,
            "sink": rules.sink,
            "n_best": c.best,
            "limit": n_scores if c.limit is None else c.limit,
            "n_skip": c.skip or 0,
            "mass": c.mass or 0,
            "threshold": c.threshold or 0.0,
            "sink_blocks": c.sink_blocks,
            "diagonal": c.diagonal or 0,
            "w_part": partial.indices.shape[3],
            "w_full": full.indices.shape[3],
            "w_skip": 0 if skipped is None else skipped.indices.shape[3],
            "dense_queries": dense_queries,
        },
        constants={
            "BLOCK_Q": rules.block_q,
            "BLOCK_K": rules.block_k,
            "NP": size,
            "TOP_P": c.mass is not None,
            "THRESHOLD": c.threshold is not None,
            "DIAGONAL": c.diagonal is not None,
            "POSITIONAL": rules.positional,
            "WINDOW": rules.window is not None,
        },
        # One warp for a short row, whose sums then need no shared memory.
        num_warps=min(16, max(1, size // 512)),
        num_stages=1,
    )
