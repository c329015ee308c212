"""Means and mean squares of blocks of tokens, computed in fp32."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.kernels.launch import runs_here
from dit_accel.kernels.lists import reads_freely
from dit_accel.kernels.operators import operator
from dit_accel.kernels.precision import wide


def pool_blocks(
    x: Float[Tensor, "b h l d"],
    block: int,
    sizes: Int[Tensor, "b_sizes n"] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "b h n d"]:
    """Return the mean of the valid tokens of each block. Not differentiable.

    Args:
        x: tokens `[B, H, L, D]`, any strides.
        block: tokens per block, >= 1.
        sizes: number of valid tokens at the start of each block, `[B|1, ceil(L / block)]`. Default: all.
            An empty block pools to 0. Padding has no effect, even if it holds NaN.
        dtype: dtype of the result. Default: fp32 (fp64 for fp64), the dtype of the computation.

    Raises:
        ValueError: `block` or the shape of `sizes` is wrong.
    """
    check_blocks(x, block, sizes)
    x = x if x.stride(-1) == 1 else x.contiguous()
    return torch.ops.dit_accel.pool_blocks(x, block, sizes, dtype)


def check_blocks(x: Tensor, block: int, sizes: Tensor | None, side: str = "") -> None:
    if block < 1:
        name = f"block_{side[0]}" if side else "block"
        raise ValueError(f"{name}={block}: accepted is an int >= 1")
    if sizes is not None:
        n = -(-x.shape[2] // block)
        # Symbolic sizes are compared one by one, not inside tuples.
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
    """Return an empty result of `pool_blocks`."""
    b, h, length, d = x.shape
    return x.new_empty(b, h, -(-length // block), d, dtype=dtype or wide(x))


@operator("pool_blocks", _pooled)
def means(
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


def moments(x: Tensor, block: int, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the mean and the mean square of the valid tokens of each block; arguments as in `pool_blocks`, unchecked.

    `x` is contiguous along its last axis.
    """
    if not runs_here(x):
        mean, mean_square = _pool_in_torch(x, block, sizes, squares=True)
        assert mean_square is not None
        return mean, mean_square
    mean, mean_square = _pooled(x, block), _pooled(x, block)
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
    """Return means, and mean squares if `squares`, in fp32 or wider.

    Results are contiguous, because `torch.compile` relies on the strides of the fake.
    """
    whole = x.shape[2] // block
    if sizes is None or (reads_freely(sizes) and bool((sizes[:, :whole] == block).all())):
        return _pool_whole_blocks(x, block, None if sizes is None else sizes[:, whole:], squares)
    pad, dtype = -x.shape[2] % block, wide(x)
    padded = torch.nn.functional.pad(x.to(dtype), (0, 0, 0, pad)).unflatten(2, (-1, block))
    padding = torch.arange(block, device=x.device) >= sizes[:, None, :, None]  # [B|1, 1, n, block]
    # Padding may hold NaN, so it is replaced, not multiplied by zero.
    valid = padded.masked_fill(padding[..., None], 0.0)
    count = sizes.clamp(min=1).to(dtype)[:, None, :, None]
    mean = (valid.sum(3) / count).contiguous()
    return mean, (valid.square().sum(3) / count).contiguous() if squares else None


def _pool_whole_blocks(
    x: Tensor, block: int, tail_sizes: Tensor | None, squares: bool
) -> tuple[Tensor, Tensor | None]:
    """Pool blocks that are all full except for the last one, whose numbers of valid tokens are `tail_sizes` `[B|1, 1]`."""
    mean, square = _pooled(x, block), _pooled(x, block) if squares else None
    whole = x.shape[2] // block
    if whole:
        # Summing a view reads x once and copies nothing. Only the ragged tail is handled separately.
        view = x[:, :, : whole * block].unflatten(2, (whole, block))
        if square is None:
            torch.mean(view, 3, dtype=mean.dtype, out=mean[:, :, :whole])
        else:
            _write_moments(view, mean[:, :, :whole], square[:, :, :whole])
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


def _write_moments(view: Tensor, mean: Tensor, square: Tensor) -> None:
    """Write mean and mean square over the tokens of blocks `[B, H, n, block, D]`.

    Works on parts that fit in the cache, so that x is read from memory once and its squares are never written to memory.
    Otherwise it would be 7x slower.
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
