"""Mean-pooled block scores, the router of SLA (arXiv 2509.24006, eq. 2) in fp32."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.kernels.launch import runs_here
from dit_accel.kernels.lists import reads_freely
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
    if block < 1:
        raise ValueError(f"block={block}: accepted is an int >= 1")
    if sizes is not None:
        n = -(-x.shape[2] // block)
        # Symbolic sizes compare one by one, not inside tuples.
        if (sizes.shape[0] != 1 and sizes.shape[0] != x.shape[0]) or sizes.shape[1] != n:
            raise ValueError(
                f"sizes: shape {tuple(sizes.shape)}; accepted is [1, {n}] or [{x.shape[0]}, {n}]"
            )
    x = x if x.stride(-1) == 1 else x.contiguous()
    return torch.ops.dit_accel.pool_blocks(x, block, sizes, dtype)


@torch.library.custom_op("dit_accel::pool_blocks", mutates_args=())
def _pool_blocks(
    x: Tensor,
    block: int,
    sizes: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if not runs_here(x):
        return _pool_in_torch(x, block, sizes).to(dtype or wide(x))
    from dit_accel.kernels.router.pool import pool_launch

    out = _pool_blocks_fake(x, block, sizes, dtype)
    pool_launch(x, out, None if sizes is None else sizes.contiguous(), block)()
    return out


@_pool_blocks.register_fake
def _pool_blocks_fake(
    x: Tensor,
    block: int,
    sizes: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    b, h, length, d = x.shape
    return x.new_empty(b, h, -(-length // block), d, dtype=dtype or wide(x))


def _pool_in_torch(x: Tensor, block: int, sizes: Tensor | None) -> Tensor:
    """In fp32 or wider, contiguous: `torch.compile` relies on the strides that the fake promises."""
    whole = x.shape[2] // block
    if sizes is None or (reads_freely(sizes) and bool((sizes[:, :whole] == block).all())):
        return _pool_whole_blocks(x, block, None if sizes is None else sizes[:, whole:])
    pad, dtype = -x.shape[2] % block, wide(x)
    padded = torch.nn.functional.pad(x.to(dtype), (0, 0, 0, pad)).unflatten(2, (-1, block))
    padding = torch.arange(block, device=x.device) >= sizes[:, None, :, None]  # [B|1, 1, n, block]
    # What padding holds may be NaN, so it is replaced, not multiplied by zero.
    total = padded.masked_fill(padding[..., None], 0.0).sum(3)
    return (total / sizes.clamp(min=1).to(dtype)[:, None, :, None]).contiguous()


def _pool_whole_blocks(x: Tensor, block: int, tail_sizes: Tensor | None) -> Tensor:
    """All blocks full but the tail, if there is one, of which `tail_sizes` `[B|1, 1]` are valid."""
    pooled = _pool_blocks_fake(x, block)
    whole = x.shape[2] // block
    if whole:
        # Summing a view reads x once and copies nothing; only the ragged tail is handled apart.
        view = x[:, :, : whole * block].unflatten(2, (whole, block))
        torch.mean(view, 3, dtype=pooled.dtype, out=pooled[:, :, :whole])
    if whole == pooled.shape[2]:
        return pooled
    tail = x[:, :, whole * block :].to(pooled.dtype)
    if tail_sizes is None:
        pooled[:, :, whole] = tail.mean(2)
        return pooled
    padding = torch.arange(tail.shape[2], device=x.device) >= tail_sizes
    total = tail.masked_fill(padding[:, None, :, None], 0.0).sum(2)
    pooled[:, :, whole] = total / tail_sizes[:, None].clamp(min=1)
    return pooled


@torch.no_grad()
def block_scores(
    q: Float[Tensor, "b h_q l_q d"],
    k: Float[Tensor, "b h_kv l_k d"],
    *,
    block_q: int,
    block_k: int,
    scale: float | None = None,
    smooth_k: bool = False,
    q_sizes: Int[Tensor, "b_q n_q"] | None = None,
    k_sizes: Int[Tensor, "b_k n_k"] | None = None,
) -> Float[Tensor, "b h_q n_q n_k"]:
    """Scaled dot products of block means: the logits by which a plan ranks key blocks.

    Args:
        q: `[B, Hq, Lq, D]`. k: `[B, Hkv, Lk, D]`, `Hq` a multiple of `Hkv`.
        block_q, block_k: tokens per block.
        scale: default `D ** -0.5`.
        smooth_k: subtract the mean of all valid keys first. It shifts every row by a constant: no
            ranking and no softmax changes, but a `threshold` then counts from the row's mean score.
        q_sizes, k_sizes: `[B|1, T]` valid tokens per block (ragged tiles, `kv_lengths`).

    Returns:
        `[B, Hq, T_q, T_k]` in fp32 (fp64 for fp64 inputs). Not differentiable, as in SLA.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q: {q.shape[1]} heads, which is no multiple of the {k.shape[1]} heads of k"
        )
    pooled_q = pool_blocks(q, block_q, q_sizes)
    pooled_k = pool_blocks(k, block_k, k_sizes)
    if smooth_k:
        pooled_k = pooled_k - _mean_of_tokens(pooled_k, k.shape[2], block_k, k_sizes)
    grouped = pooled_q.unflatten(1, (k.shape[1], -1))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with no_autocast(q):
        return ((grouped * scale) @ pooled_k[:, :, None].mT).flatten(1, 2)


def _mean_of_tokens(pooled: Tensor, length: int, block: int, sizes: Tensor | None) -> Tensor:
    """Mean over all valid tokens, `[B, H, 1, D]`, from the means of the blocks."""
    if sizes is None:
        starts = torch.arange(pooled.shape[2], device=pooled.device)[None] * block
        sizes = (length - starts).clamp(max=block)
    share = sizes / sizes.sum(-1, keepdim=True).clamp(min=1)
    return (pooled * share.to(pooled.dtype)[:, None, :, None]).sum(2, keepdim=True)
