"""Mean-pooled block scores, the router of SLA (arXiv 2509.24006, eq. 2) in fp32."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.kernels.lists import reads_freely


def pool_blocks(
    x: Float[Tensor, "b h l d"], block: int, sizes: Int[Tensor, "b_sizes n"] | None = None
) -> Float[Tensor, "b h n d"]:
    """Mean of the valid tokens of each block, in fp32 (fp64 for fp64).

    Args:
        x: `[B, H, L, D]`, any strides.
        block: tokens per block.
        sizes: `[B|1, ceil(L / block)]`, valid tokens at the start of each block. Default: all.
            An empty block pools to 0.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    return torch.ops.dit_accel.pool_blocks(x, block, sizes)


@torch.library.custom_op("dit_accel::pool_blocks", mutates_args=())
def _pool_blocks(x: Tensor, block: int, sizes: Tensor | None) -> Tensor:
    if not x.is_cuda or x.dtype == torch.float64:
        return _pool_in_torch(x, block, sizes)
    from dit_accel.kernels.router.pool import pool_launch

    out = _pool_blocks_fake(x, block, sizes)
    pool_launch(x, out, None if sizes is None else sizes.contiguous(), block)()
    return out


@_pool_blocks.register_fake
def _pool_blocks_fake(x: Tensor, block: int, sizes: Tensor | None) -> Tensor:
    b, h, length, d = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(b, h, -(-length // block), d, dtype=dtype)


def _pool_in_torch(x: Tensor, block: int, sizes: Tensor | None) -> Tensor:
    length = x.shape[2]
    pooled = _pool_blocks_fake(x, block, sizes)
    n, whole, dtype = pooled.shape[2], length // block, pooled.dtype
    if sizes is None or (reads_freely(sizes) and bool((sizes[:, :whole] == block).all())):
        # Summing a view reads x once and copies nothing; only the ragged tail is handled apart.
        if whole:
            torch.mean(
                x[:, :, : whole * block].unflatten(2, (whole, block)),
                3,
                dtype=dtype,
                out=pooled[:, :, :whole],
            )
        if whole < n:
            tail = x[:, :, whole * block :].to(dtype)
            if sizes is None:
                pooled[:, :, whole] = tail.mean(2)
            else:
                valid = torch.arange(tail.shape[2], device=x.device) < sizes[:, whole, None]
                total = tail.masked_fill(~valid[:, None, :, None], 0.0).sum(2)
                pooled[:, :, whole] = total / sizes[:, None, whole, None].clamp(min=1)
        return pooled
    padded = torch.nn.functional.pad(x.to(dtype), (0, 0, 0, n * block - length))
    padding = torch.arange(block, device=x.device) >= sizes[:, None, :, None]  # [B|1, 1, n, block]
    # What padding holds may be NaN, so it is replaced, not multiplied by zero.
    total = padded.unflatten(2, (n, block)).masked_fill(padding[..., None], 0.0).sum(3)
    return total / sizes.clamp(min=1).to(dtype)[:, None, :, None]


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
        smooth_k: subtract the mean of all valid keys first. It shifts every row by a constant, so
            no ranking changes in fp32; a `threshold` then counts from the row's mean.
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
        weights = torch.full_like(pooled_k[:1, 0, :, 0], block_k)
        weights[:, -1] = k.shape[2] - block_k * (pooled_k.shape[2] - 1)
        weights = weights if k_sizes is None else k_sizes.to(pooled_k.dtype)
        share = weights / weights.sum(-1, keepdim=True).clamp(min=1)
        pooled_k = pooled_k - (pooled_k * share[:, None, :, None]).sum(2, keepdim=True)
    grouped = pooled_q.unflatten(1, (k.shape[1], -1))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return ((grouped * scale) @ pooled_k[:, :, None].mT).flatten(1, 2)
