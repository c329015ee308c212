"""Reference implementation, in torch, of the selection of kept and skipped blocks from scores."""

import math

import torch
from torch import Tensor

from dit_accel.kernels import visibility
from dit_accel.kernels.geometry import Rules
from dit_accel.kernels.lists import Lists, lists_of_width
from dit_accel.kernels.router.criteria import MASS_BITS, Criteria

# Fractional bits of softmax weights, which are fixed-point integers. Their sums are exact, so they do not depend on the
# order of additions in a kernel.
WEIGHT_BITS = 25
LOWEST, HIGHEST = -(2**31), 2**31 - 1


def select_blocks(
    scores: Tensor,
    open_blocks: Tensor,
    criteria: Criteria,
    forced: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the masks of the best blocks of each row, at least one, and of the worst blocks to skip.

    Args:
        scores: logits `[..., T_q, T_k]`; higher is better. Among equal scores, the lower index ranks first, on every device.
        open_blocks: mask of blocks with a visible key. Other blocks are not kept and do not count.
        criteria: numbers of blocks to keep and to skip.
        forced: mask of blocks to keep in addition, broadcast to the scores.

    Returns:
        `(kept, skipped)`; `skipped` is None without `criteria.skip`.
    """
    scores, n_k = scores.float(), scores.shape[-1]
    key = _ordered(scores, open_blocks)
    n: int | Tensor = criteria.best
    ranked = None
    if criteria.top_p is not None or criteria.skip is not None:
        ranked = key.sort(-1, descending=True).values
    if criteria.top_p is not None:
        assert ranked is not None
        n = _reaching(ranked, criteria).clamp(min=n)
    if criteria.threshold is not None:
        reaches = (scores >= criteria.threshold) & open_blocks
        n = reaches.sum(-1, keepdim=True, dtype=torch.int32).clamp(min=n)
    if criteria.limit is not None and isinstance(n, Tensor):
        n = n.clamp(max=criteria.limit)
    kept = _best(key, n, ranked) & open_blocks
    if forced is not None:
        kept = kept | (forced & open_blocks)
    if criteria.skip is None:
        return kept, None
    n_open = open_blocks.sum(-1, keepdim=True, dtype=torch.int32)
    rest = _best(key, (n_open - criteria.skip).clamp(max=n_k), ranked)
    return kept, open_blocks & ~rest & ~kept


def _ordered(scores: Tensor, open_blocks: Tensor) -> Tensor:
    """Return int32 keys with the order of the fp32 scores. NaN is the largest; blocks that are not open are the smallest."""
    bits = (scores + 0.0).view(torch.int32)  # -0 + 0 is 0
    key = (bits ^ ((bits >> 31) & HIGHEST)).masked_fill_(scores.isnan(), HIGHEST)
    return torch.where(open_blocks, key, LOWEST)


def _best(key: Tensor, n: int | Tensor, ranked: Tensor | None) -> Tensor:
    """Return the mask of the n largest keys of each row. Among equal keys, the lower index ranks first.

    Args:
        key: keys of the blocks.
        n: one number, or one for each row, `[..., 1]`.
        ranked: keys in descending order, if already known.
    """
    if isinstance(n, int | torch.SymInt):
        last = key.topk(n, -1, sorted=False).values.amin(-1, keepdim=True)
    else:
        ranked = key.sort(-1, descending=True).values if ranked is None else ranked
        last = ranked.gather(-1, (n.expand(*key.shape[:-1], 1) - 1).clamp(min=0).long())
    above, tie = key > last, key == last
    room = n - above.sum(-1, keepdim=True, dtype=torch.int32)
    kept = above | (tie & (tie.cumsum(-1, dtype=torch.int32) <= room))
    return kept if isinstance(n, int | torch.SymInt) else kept & (n > 0)


def _reaching(ranked: Tensor, criteria: Criteria) -> Tensor:
    """Return the number of best blocks whose softmax weights reach the mass, `[..., 1]`."""
    bits = ranked ^ ((ranked >> 31) & HIGHEST)
    scores = bits.view(torch.float32).masked_fill(ranked == LOWEST, -math.inf)
    top = scores.nan_to_num(-math.inf, math.inf, -math.inf).amax(-1, keepdim=True)
    weights = (scores - top.masked_fill(top == -math.inf, 0.0)).exp()
    weights = weights.masked_fill(scores == top, 1.0).masked_fill(scores.isnan(), 0.0)
    weights = weights.masked_fill(scores == -math.inf, 0.0)  # blocks that are not open, too
    whole = (weights * 2**WEIGHT_BITS + 0.5).to(torch.int32).to(torch.int64)
    assert criteria.mass is not None
    goal = (whole.sum(-1, keepdim=True) * criteria.mass + 2**MASS_BITS - 1) >> MASS_BITS
    before = whole.cumsum(-1) - whole
    reached = (before < goal) & (ranked > LOWEST)
    return reached.sum(-1, keepdim=True, dtype=torch.int32)


def select_in_torch(
    scores: Tensor,
    rules: Rules,
    criteria: Criteria,
    widths: tuple[int, int, int],
    tally: Tensor | None,
    dense_queries: int,
) -> tuple[Lists, Lists, Lists | None]:
    """Return partial, full and skip lists of these widths, and add to `tally` (see `SparsePlan.from_scores`)."""
    n_k, n_scores = rules.num_k_blocks, scores.shape[-1]
    some, every = visibility.block_visibility(rules)
    # A block without a visible key must not count among the best.
    open_blocks = some[..., :n_scores]
    kept, skipped = select_blocks(scores, open_blocks, criteria, _forced(rules, criteria, n_scores))
    if n_scores < n_k:
        # Tail blocks have no score, and every row reads them.
        kept = torch.nn.functional.pad(kept, (0, n_k - n_scores), value=True) & some
    if tally is not None:
        q_sizes, k_sizes = rules.q_sizes(), rules.k_sizes()[:, None, None, :]
        keys = torch.where(kept, k_sizes, 0).sum(-1)
        heads = kept.shape[1]
        every_key = k_sizes.sum() * (heads * (kept.shape[0] // k_sizes.shape[0]))
        extra = every_key * dense_queries
        tally[0] += 1
        tally[1] += (keys * q_sizes).sum() + extra
        tally[2] += every_key * q_sizes.sum() + extra
    w_part, w_full, w_skip = widths
    return (
        lists_of_width(kept & ~every, w_part),
        lists_of_width(kept & every, w_full),
        None if skipped is None else lists_of_width(skipped, w_skip),
    )


def _forced(rules: Rules, criteria: Criteria, n: int) -> Tensor | None:
    """Return the mask of sink and diagonal blocks, `[1, Hq|1, T_q|1, n]`."""
    if not criteria.sink_blocks and criteria.diagonal is None:
        return None
    block = torch.arange(n, device=rules.device)
    forced = (block < criteria.sink_blocks).expand(1, 1, 1, -1)
    if criteria.diagonal is None:
        return forced
    first, last = (
        x.div(rules.block_k, rounding_mode="floor")[..., None] for x in visibility.row_ends(rules)
    )
    near = (block >= first - criteria.diagonal) & (block <= last + criteria.diagonal)
    return forced | near[None]
