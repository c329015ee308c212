"""Which blocks of a row are kept, and which are skipped, given their scores."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def select_blocks(
    scores: Float[Tensor, "... n_q n_k"],
    open_blocks: Bool[Tensor, "... n_q n_k"],
    *,
    topk: float | None = None,
    top_p: float | None = None,
    threshold: float | None = None,
    skip: float = 0.0,
    forced: Bool[Tensor, "... n_q n_k"] | None = None,
) -> tuple[Bool[Tensor, "... n_q n_k"], Bool[Tensor, "... n_q n_k"] | None]:
    """The best blocks of each row, at least one; and the worst ones, if any are to be skipped.

    Args:
        scores: logits; higher is better. Ties go to the lower index, on every device.
        open_blocks: blocks that hold a visible key; no other is kept or uses up a place.
        topk: fraction in (0, 1]: the `max(1, ceil(topk * T_k))` best blocks.
        top_p: in (0, 1]: the fewest best blocks whose softmax weights sum to at least `top_p`.
            With `topk` too: the union of both.
        threshold: every block whose score is at least this (alone).
        skip: fraction in [0, 1): the `floor(skip * T_k)` worst open blocks, unless they are kept.
        forced: blocks kept in addition.

    Returns:
        `(kept, skipped)`; `skipped` is None for `skip=0`.

    Raises:
        ValueError: no criterion, two that exclude each other, or one out of range.
    """
    chosen = [
        n for n, x in (("topk", topk), ("top_p", top_p), ("threshold", threshold)) if x is not None
    ]
    if not chosen or ("threshold" in chosen and len(chosen) > 1):
        raise ValueError(
            f"topk, top_p, threshold: got {chosen or 'none'}; accepted are topk, top_p, both, "
            "or threshold alone"
        )
    for name, x in (("topk", topk), ("top_p", top_p)):
        if x is not None and not 0 < x <= 1:
            raise ValueError(f"{name}={x}: accepted is a fraction in (0, 1]")
    if not 0 <= skip < 1:
        raise ValueError(f"skip={skip}: accepted is a fraction in [0, 1)")
    n_k = scores.shape[-1]
    scores = scores.float().masked_fill(~open_blocks, -math.inf)
    ranked, order = torch.sort(scores, dim=-1, descending=True, stable=True)
    keep = torch.zeros_like(ranked, dtype=torch.bool)
    if topk is not None:
        keep[..., : topk_blocks(topk, n_k)] = True
    if top_p is not None:
        weights = torch.softmax(ranked, dim=-1).nan_to_num(0.0)  # a row without any open block
        keep |= weights.cumsum(-1) - weights < top_p
    if threshold is not None:
        keep |= ranked >= threshold
    keep[..., 0] = True
    kept = torch.zeros_like(keep).scatter_(-1, order, keep) & open_blocks
    if forced is not None:
        kept = kept | (forced & open_blocks)
    if not skip:
        return kept, None
    n_open = open_blocks.sum(-1, keepdim=True)
    # floor(x) as -ceil(-x): torch.compile knows no floor of a symbolic product.
    worst = torch.arange(n_k, device=scores.device) >= n_open + math.ceil(-skip * n_k - 1e-9)
    worst = worst.expand_as(keep).contiguous()
    return kept, torch.zeros_like(keep).scatter_(-1, order, worst) & open_blocks & ~kept


def topk_blocks(topk: float, n_k: int) -> int:
    """Blocks that the fraction `topk` of `n_k` stands for, at least one."""
    # The epsilon keeps ceil(.07 * 100) at 7: the product is 7.000000000000001 in binary.
    return max(1, math.ceil(topk * n_k - 1e-9))
