"""Block scores from pooled tokens: the router of SLA (arXiv 2509.24006, eq. 2) and one that knows spread, in fp32."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.kernels.launch import runs_here
from dit_accel.kernels.lists import reads_freely
from dit_accel.kernels.operators import operator
from dit_accel.kernels.precision import no_autocast, wide


def pool_blocks(
    x: Float[Tensor, "b h l d"],
    block: int,
    sizes: Int[Tensor, "b_sizes n"] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "b h n d"]:
    """Mean of the valid tokens of each block. Not differentiable.

    Args:
        x: `[B, H, L, D]`, any strides.
        block: tokens per block, >= 1.
        sizes: `[B|1, ceil(L / block)]`, valid tokens at the start of each block. Default: all.
            An empty block pools to 0; what padding holds is never read.
        dtype: of the result. Default: fp32 (fp64 for fp64), in which the mean is computed anyway.

    Raises:
        ValueError: `block` or the shape of `sizes` is wrong.
    """
    _check_blocks(x, block, sizes)
    x = x if x.stride(-1) == 1 else x.contiguous()
    return torch.ops.dit_accel.pool_blocks(x, block, sizes, dtype)


def pool_moments(
    x: Float[Tensor, "b h l d"], block: int, sizes: Int[Tensor, "b_sizes n"] | None = None
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n d"]]:
    """Mean, and mean square, of the valid tokens of each block; arguments and errors as of `pool_blocks`."""
    _check_blocks(x, block, sizes)
    x = x if x.stride(-1) == 1 else x.contiguous()
    return torch.ops.dit_accel.pool_moments(x, block, sizes)


def _check_blocks(x: Tensor, block: int, sizes: Tensor | None, side: str = "") -> None:
    if block < 1:
        name = f"block_{side[0]}" if side else "block"
        raise ValueError(f"{name}={block}: accepted is an int >= 1")
    if sizes is not None:
        n = -(-x.shape[2] // block)
        # Symbolic sizes compare one by one, not inside tuples.
        if (sizes.shape[0] != 1 and sizes.shape[0] != x.shape[0]) or sizes.shape[1] != n:
            raise ValueError(
                f"{side}sizes: shape {tuple(sizes.shape)}; accepted is [1, {n}] or [{x.shape[0]}, {n}]"
            )


def _pooled(
    x: Tensor,
    block: int,
    sizes: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """An empty result of `pool_blocks`."""
    b, h, length, d = x.shape
    return x.new_empty(b, h, -(-length // block), d, dtype=dtype or wide(x))


def _two_pooled(x: Tensor, block: int, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return _pooled(x, block), _pooled(x, block)


@operator("pool_blocks", _pooled)
def _pool_blocks(
    x: Tensor,
    block: int,
    sizes: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if not runs_here(x):
        return _pool_in_torch(x, block, sizes)[0].to(dtype or wide(x))
    out = _pooled(x, block, dtype=dtype)
    _launch_pool(x, out, block, sizes)
    return out


@operator("pool_moments", _two_pooled)
def _pool_moments(x: Tensor, block: int, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if not runs_here(x):
        mean, mean_square = _pool_in_torch(x, block, sizes, squares=True)
        assert mean_square is not None
        return mean, mean_square
    mean, mean_square = _two_pooled(x, block)
    _launch_pool(x, mean, block, sizes, mean_square)
    return mean, mean_square


def _launch_pool(
    x: Tensor, out: Tensor, block: int, sizes: Tensor | None, squares: Tensor | None = None
) -> None:
    from dit_accel.kernels.router.pool import pool_launch

    pool_launch(x, out, None if sizes is None else sizes.contiguous(), block, squares)()


def _pool_in_torch(
    x: Tensor, block: int, sizes: Tensor | None, *, squares: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return means, and mean squares if asked for, in fp32 or wider.

    Contiguous: `torch.compile` relies on the strides that the fake promises.
    """
    whole = x.shape[2] // block
    if sizes is None or (reads_freely(sizes) and bool((sizes[:, :whole] == block).all())):
        return _pool_whole_blocks(x, block, None if sizes is None else sizes[:, whole:], squares)
    pad, dtype = -x.shape[2] % block, wide(x)
    padded = torch.nn.functional.pad(x.to(dtype), (0, 0, 0, pad)).unflatten(2, (-1, block))
    padding = torch.arange(block, device=x.device) >= sizes[:, None, :, None]  # [B|1, 1, n, block]
    # What padding holds may be NaN, so it is replaced, not multiplied by zero.
    valid = padded.masked_fill(padding[..., None], 0.0)
    count = sizes.clamp(min=1).to(dtype)[:, None, :, None]
    mean = (valid.sum(3) / count).contiguous()
    return mean, (valid.square().sum(3) / count).contiguous() if squares else None


def _pool_whole_blocks(
    x: Tensor, block: int, tail_sizes: Tensor | None, squares: bool
) -> tuple[Tensor, Tensor | None]:
    """Pool where all blocks are full but the tail, if any, of which `tail_sizes` `[B|1, 1]` are valid."""
    mean, square = _pooled(x, block), _pooled(x, block) if squares else None
    whole = x.shape[2] // block
    if whole:
        # Summing a view reads x once and copies nothing; only the ragged tail is handled apart.
        view = x[:, :, : whole * block].unflatten(2, (whole, block))
        if square is None:
            torch.mean(view, 3, dtype=mean.dtype, out=mean[:, :, :whole])
        else:
            _moments(view, mean[:, :, :whole], square[:, :, :whole])
    if whole == mean.shape[2]:
        return mean, square
    tail = x[:, :, whole * block :].to(mean.dtype)
    if tail_sizes is not None:
        padding = torch.arange(tail.shape[2], device=x.device) >= tail_sizes
        tail = tail.masked_fill(padding[:, None, :, None], 0.0)
    count = tail.shape[2] if tail_sizes is None else tail_sizes[:, None].clamp(min=1)
    mean[:, :, whole] = tail.sum(2) / count
    if square is not None:
        square[:, :, whole] = tail.square().sum(2) / count
    return mean, square


def _moments(view: Tensor, mean: Tensor, square: Tensor) -> None:
    """Write mean and mean square over the tokens of blocks `[B, H, n, block, D]`.

    A cacheful at a time: x is read from memory once, and its squares never reach memory (7x slower).
    """
    b, h, n, block, d = view.shape
    step = min(n, max(1, 2**19 // (b * h * block * d)))
    scratch = torch.empty(b, h, step, block, d, dtype=mean.dtype, device=mean.device)
    for part, mean_part, square_part in zip(
        view.split(step, 2), mean.split(step, 2), square.split(step, 2), strict=True
    ):
        torch.mean(part, 3, dtype=mean.dtype, out=mean_part)
        squared = scratch[:, :, : part.shape[2]]
        torch.mul(part, part.to(mean.dtype), out=squared)
        torch.mean(squared, 3, out=square_part)


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
    q_sizes: Int[Tensor, "b_q n_q"] | None = None,
    k_sizes: Int[Tensor, "b_k n_k"] | None = None,
) -> Float[Tensor, "b h_q n_q n_k"]:
    """Scaled dot products of block means: the logits by which a plan ranks key blocks.

    A block whose keys differ holds more attention than its mean tells: exp is convex. With `spread`, each
    score estimates the mean over queries of `log(mean_j exp(scale * q . k_j))`. With channels taken as
    independent, the logits of a query have variance `s = scale**2 * sum_d q_d**2 var_d(k)`; for normal
    logits the correction is `s / 2`, until the largest of `n = block_k` draws rules the sum:
    `sqrt(2 s log n) - log n` from `s = 2 log n` on (Derrida's random-energy model, Phys. Rev. B 24, 2613).

    Args:
        q: `[B, Hq, Lq, D]`. k: `[B, Hkv, Lk, D]`, `Hq` a multiple of `Hkv`.
        block_q, block_k: tokens per block.
        scale: default `D ** -0.5`.
        smooth_k: subtract the mean of all valid keys first. It shifts every row by a constant: no
            ranking and no softmax changes, but a `threshold` then counts from the row's mean score.
        spread: add what the spread of keys inside a block brings.
        q_sizes, k_sizes: `[B|1, T]` valid tokens per block (ragged tiles, `kv_lengths`).

    Returns:
        `[B, Hq, T_q, T_k]` in fp32 (fp64 for fp64 inputs). Not differentiable, as in SLA.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q: {q.shape[1]} heads, which is no multiple of the {k.shape[1]} heads of k"
        )
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _check_blocks(q, block_q, q_sizes, "q_")
    _check_blocks(k, block_k, k_sizes, "k_")
    return torch.ops.dit_accel.block_scores(
        q, k, q_sizes, k_sizes, block_q, block_k, float(scale), smooth_k, spread
    )


def _no_scores(
    q: Tensor, k: Tensor, q_sizes, k_sizes, block_q: int, block_k: int, *rest: Any
) -> Tensor:
    """An empty result of `block_scores`."""
    return q.new_empty(
        *q.shape[:2], -(-q.shape[2] // block_q), -(-k.shape[2] // block_k), dtype=wide(q)
    )


@operator("block_scores", _no_scores)
def _block_scores(
    q: Tensor,
    k: Tensor,
    q_sizes: Tensor | None,
    k_sizes: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    smooth_k: bool,
    spread: bool,
) -> Tensor:
    squares: tuple[Tensor, Tensor] | None = None
    if spread:
        pooled_q, square_q = _pool_moments(q, block_q, q_sizes)
        pooled_k, square_k = _pool_moments(k, block_k, k_sizes)
        squares = square_q, square_k
    else:
        pooled_q, pooled_k = _pool_blocks(q, block_q, q_sizes), _pool_blocks(k, block_k, k_sizes)
    mean = _mean_of_tokens(pooled_k, k.shape[2], block_k, k_sizes) if smooth_k else None
    if not runs_here(q):
        return _scores_in_torch(pooled_q, pooled_k, squares, mean, scale, block_k)
    from dit_accel.kernels.router.scores_kernel import scores_launch

    out = pooled_q.new_empty(*pooled_q.shape[:3], pooled_k.shape[2])
    scores_launch(pooled_q, pooled_k, squares, mean, out, scale=scale, block_k=block_k)()
    return out


def _scores_in_torch(
    q: Tensor,
    k: Tensor,
    squares: tuple[Tensor, Tensor] | None,
    mean: Tensor | None,
    scale: float,
    block_k: int,
) -> Tensor:
    """Scores of what was pooled; `mean` `[B, Hkv, 1, D]` is subtracted from the keys."""
    scores = _products(q * scale, k if mean is None else k - mean)
    if squares is None:
        return scores
    variance = (squares[1] - k.square()).clamp(min=0)
    return scores + _spread_gain(_products(squares[0] * scale**2, variance), block_k)


def _products(q: Tensor, k: Tensor) -> Tensor:
    """`q @ k.mT` with grouped heads, `[B, Hq, T_q, T_k]`."""
    with no_autocast(q):
        return (q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].mT).flatten(1, 2)


def _spread_gain(variance: Tensor, n: int) -> Tensor:
    """What normal logits of this variance add to the logarithm of their mean exponential, for n draws."""
    most = 2 * math.log(n)
    return torch.where(variance <= most, variance / 2, (variance * most).sqrt() - most / 2)


def _mean_of_tokens(pooled: Tensor, length: int, block: int, sizes: Tensor | None) -> Tensor:
    """Mean over all valid tokens, `[B, H, 1, D]`, from the means of the blocks."""
    if sizes is None:
        starts = torch.arange(pooled.shape[2], device=pooled.device)[None] * block
        sizes = (length - starts).clamp(max=block)
    share = sizes / sizes.sum(-1, keepdim=True).clamp(min=1)
    return (pooled * share.to(pooled.dtype)[:, None, :, None]).sum(2, keepdim=True)
