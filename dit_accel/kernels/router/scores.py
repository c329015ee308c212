"""Block scores from pooled tokens, in fp32: the router of SLA (arXiv 2509.24006, eq. 2), optionally with spread."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.kernels.launch import runs_here
from dit_accel.kernels.operators import operator
from dit_accel.kernels.precision import no_autocast, wide
from dit_accel.kernels.router import pooling


@torch.no_grad()
def block_scores(
    q: Float[Tensor, "b h_q l_q d"],
    k: Float[Tensor, "b h_kv l_k d"],
    *,
    block_q: int,
    block_k: int,
    scale: float | None = None,
    smooth_k: bool = False,
    spread: bool = False,
    projection: Float[Tensor, "h_q d d"] | None = None,
    q_sizes: Int[Tensor, "b_q n_q"] | None = None,
    k_sizes: Int[Tensor, "b_k n_k"] | None = None,
) -> Float[Tensor, "b h_q n_q n_k"]:
    """Return scaled dot products of block means: the logits from which a plan ranks key blocks.

    The mean underestimates the attention of a block whose keys differ, because exp is convex. With `spread`, each
    score estimates the mean over queries of `log(mean_j exp(scale * q . k_j))`. With channels taken as
    independent, the logits of a query have variance `s = scale**2 * sum_d q_d**2 var_d(k)`; for normal
    logits the correction is `s / 2`. Where the largest of `n = block_k` draws dominates the sum, it is
    `sqrt(2 s log n) - log n`, from `s = 2 log n` on (Derrida's random-energy model, Phys. Rev. B 24, 2613).

    Args:
        q: queries `[B, Hq, Lq, D]`.
        k: keys `[B, Hkv, Lk, D]`; `Hq` is a multiple of `Hkv`.
        block_q, block_k: tokens per query block and per key block.
        scale: factor of the dot products. Default: `D ** -0.5`.
        smooth_k: subtract the mean of all valid keys first. This shifts every row by a constant: no ranking and no
            softmax changes, but a `threshold` is then relative to the row's mean score.
        spread: add the correction for keys that differ inside a block.
        projection: learned matrix W of each head, `[Hq, D, D]`. Scores are `scale * (mean(Q) W) . mean(K)`; the
            correction of `spread` does not change. Projections W_q of the queries and W_k of the keys are equivalent to
            `W = W_q W_k^T`. Default: none.
        q_sizes, k_sizes: number of valid tokens of each block, `[B|1, T]` (ragged blocks, `kv_lengths`). Default: all.

    Returns:
        `[B, Hq, T_q, T_k]` in fp32 (fp64 for fp64 inputs). Not differentiable, as in SLA.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q: {q.shape[1]} heads, which is no multiple of the {k.shape[1]} heads of k"
        )
    if projection is not None and (
        projection.shape[0] != q.shape[1] or projection.shape[1] != q.shape[3]
    ):
        raise ValueError(
            f"projection: shape {tuple(projection.shape)}; accepted is [{q.shape[1]}, {q.shape[3]}, {q.shape[3]}]"
        )
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    pooling.check_blocks(q, block_q, q_sizes, "q_")
    pooling.check_blocks(k, block_k, k_sizes, "k_")
    return torch.ops.dit_accel.block_scores(
        q, k, q_sizes, k_sizes, projection, block_q, block_k, float(scale), smooth_k, spread
    )


def _no_scores(
    q: Tensor, k: Tensor, q_sizes, k_sizes, projection, block_q: int, block_k: int, *rest: Any
) -> Tensor:
    """Return an empty result of `block_scores`."""
    return q.new_empty(
        *q.shape[:2], -(-q.shape[2] // block_q), -(-k.shape[2] // block_k), dtype=wide(q)
    )


@operator("block_scores", _no_scores)
def _block_scores(
    q: Tensor,
    k: Tensor,
    q_sizes: Tensor | None,
    k_sizes: Tensor | None,
    projection: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    smooth_k: bool,
    spread: bool,
) -> Tensor:
    squares: tuple[Tensor, Tensor] | None = None
    if spread:
        pooled_q, square_q = pooling.moments(q, block_q, q_sizes)
        pooled_k, square_k = pooling.moments(k, block_k, k_sizes)
        squares = square_q, square_k
    else:
        pooled_q, pooled_k = pooling.means(q, block_q, q_sizes), pooling.means(k, block_k, k_sizes)
    if projection is not None:
        pooled_q = project(pooled_q, projection)
    mean = _mean_of_tokens(pooled_k, k.shape[2], block_k, k_sizes) if smooth_k else None
    if not runs_here(q):
        return _scores_in_torch(pooled_q, pooled_k, squares, mean, scale, block_k)
    from dit_accel.kernels.router.scores_kernel import scores_launch

    out = pooled_q.new_empty(*pooled_q.shape[:3], pooled_k.shape[2])
    scores_launch(pooled_q, pooled_k, squares, mean, out, scale=scale, block_k=block_k)()
    return out


def project(
    pooled: Float[Tensor, "b h n d"], projection: Float[Tensor, "h d d"]
) -> Float[Tensor, "b h n d"]:
    """Return pooled tokens multiplied by the matrix of their head, in their dtype. Contiguous, differentiable."""
    with no_autocast(pooled):
        return (pooled @ projection.to(pooled)).contiguous()


def _scores_in_torch(
    q: Tensor,
    k: Tensor,
    squares: tuple[Tensor, Tensor] | None,
    mean: Tensor | None,
    scale: float,
    block_k: int,
) -> Tensor:
    """Return the scores of pooled tokens. `mean` `[B, Hkv, 1, D]` is subtracted from the keys."""
    scores = _products(q * scale, k if mean is None else k - mean)
    if squares is None:
        return scores
    variance = (squares[1] - k.square()).clamp(min=0)
    return scores + _spread_gain(_products(squares[0] * scale**2, variance), block_k)


def _products(q: Tensor, k: Tensor) -> Tensor:
    """Return `q @ k.mT` with grouped heads, `[B, Hq, T_q, T_k]`."""
    with no_autocast(q):
        return (q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].mT).flatten(1, 2)


def _spread_gain(variance: Tensor, n: int) -> Tensor:
    """Return log(mean(exp(x))) of n normal logits x with mean 0 and this variance."""
    most = 2 * math.log(n)
    return torch.where(variance <= most, variance / 2, (variance * most).sqrt() - most / 2)


def _mean_of_tokens(pooled: Tensor, length: int, block: int, sizes: Tensor | None) -> Tensor:
    """Return the mean over all valid tokens, `[B, H, 1, D]`, from the means of the blocks."""
    if sizes is None:
        starts = torch.arange(pooled.shape[2], device=pooled.device)[None] * block
        sizes = (length - starts).clamp(max=block)
    share = sizes / sizes.sum(-1, keepdim=True).clamp(min=1)
    return (pooled * share.to(pooled.dtype)[:, None, :, None]).sum(2, keepdim=True)
