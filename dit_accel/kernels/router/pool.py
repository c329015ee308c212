"""Triton kernel of block means and mean squares for the router. It reads every token once."""

import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import Launch


@triton.jit(do_not_specialize=("length", "size_b"))
def pool_kernel(
    X, OUT, SQUARES, SIZES, x_b, x_h, x_l, length, size_b,
    HEAD_DIM: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, TL: tl.constexpr,
):  # fmt: skip
    """Write the mean (and mean square) of the valid tokens of one block; 0 for a block without valid tokens."""
    i_block, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_blocks, n_h = tl.num_programs(0), tl.num_programs(1)
    o_d = tl.arange(0, DP)
    m_d = o_d < HEAD_DIM
    size = tl.minimum(BLOCK, length - i_block * BLOCK)
    if SIZES is not None:
        size = tl.minimum(size, tl.load(SIZES + i_b * size_b + i_block).to(tl.int32))
    X += i_b.to(tl.int64) * x_b + i_h.to(tl.int64) * x_h
    X += (i_block * BLOCK).to(tl.int64) * x_l
    b_sum = tl.zeros([DP], tl.float32)
    b_squares = tl.zeros([DP], tl.float32)
    for start in range(0, size, TL):
        o_l = start + tl.arange(0, TL)
        # [TL, DP]
        p_x = X + o_l[:, None].to(tl.int64) * x_l + o_d[None, :]
        b_x = tl.load(p_x, mask=(o_l[:, None] < size) & m_d[None, :], other=0.0).to(tl.float32)
        b_sum += tl.sum(b_x, 0)
        if SQUARES is not None:
            b_squares += tl.sum(b_x * b_x, 0)
    o_out = ((i_b * n_h + i_h).to(tl.int64) * n_blocks + i_block) * HEAD_DIM + o_d
    tl.store(OUT + o_out, (b_sum / tl.maximum(size, 1)).to(OUT.dtype.element_ty), mask=m_d)
    if SQUARES is not None:
        tl.store(SQUARES + o_out, b_squares / tl.maximum(size, 1), mask=m_d)


def pool_launch(
    x: Tensor, out: Tensor, sizes: Tensor | None, block: int, squares: Tensor | None = None
) -> Launch:
    """Return the launch that fills `out` and `squares` from `x`. Tensors may be on any device, including "meta".

    Args:
        x: tokens `[B, H, L, D]`, contiguous along D.
        out: output, means `[B, H, n, D]` with n = ceil(L / block), contiguous.
        sizes: number of valid tokens of each block, `[B|1, n]`, contiguous; None: all.
        block: tokens per block.
        squares: output, mean squares, like `out` in fp32. Default: not computed.
    """
    batch, heads, length, d = x.shape
    return Launch(
        kernel=pool_kernel,
        grid=(out.shape[2], heads, batch),
        arguments={
            "X": x,
            "OUT": out,
            "SQUARES": squares,
            "SIZES": sizes,
            **{f"x_{axis}": x.stride(i) for i, axis in enumerate("bhl")},
            "length": length,
            "size_b": 0 if sizes is None or len(sizes) == 1 else sizes.shape[1],
        },
        constants={
            "HEAD_DIM": d,
            "DP": max(16, 1 << (d - 1).bit_length()),
            "BLOCK": block,
            "TL": min(64, 1 << (block - 1).bit_length()),
        },
        num_warps=4,
        num_stages=1,
    )
