"""Triton kernel of the router: scores of all pairs of blocks from pooled tokens, in fp32."""

import math

import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import Launch

TILE, TILE_D = 64, 16
COUNTS = ("n_q", "n_k", "group", "scale", "most")


@triton.jit(do_not_specialize=COUNTS)
def scores_kernel(
    Q, K, Q_SQUARES, K_SQUARES, MEAN, OUT, n_q, n_k, d, group, scale, most,
    TQ: tl.constexpr, TK: tl.constexpr, TD: tl.constexpr,
):  # fmt: skip
    """Write scale q.k, plus the gain of the variance scale^2 sum_d E[q_d^2] (E[k_d^2] - E[k_d]^2) if squares are given."""
    i_tile, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_h = tl.num_programs(1)
    tiles_k = tl.cdiv(n_k, TK)
    o_q = (i_tile // tiles_k) * TQ + tl.arange(0, TQ)
    o_k = (i_tile % tiles_k) * TK + tl.arange(0, TK)
    m_q, m_k = o_q < n_q, o_k < n_k
    q_row = ((i_b * n_h + i_h).to(tl.int64) * n_q + o_q) * d
    k_row = ((i_b * (n_h // group) + i_h // group).to(tl.int64) * n_k + o_k) * d
    b_s = tl.zeros([TQ, TK], tl.float32)
    b_variance = tl.zeros([TQ, TK], tl.float32)
    for start in range(0, d, TD):
        o_d = start + tl.arange(0, TD)
        # [TQ, TD], [TK, TD]
        p_q, p_k = q_row[:, None] + o_d[None, :], k_row[:, None] + o_d[None, :]
        m_qd = m_q[:, None] & (o_d[None, :] < d)
        m_kd = m_k[:, None] & (o_d[None, :] < d)
        b_q = tl.load(Q + p_q, mask=m_qd, other=0.0) * scale
        b_k = tl.load(K + p_k, mask=m_kd, other=0.0)
        b_v = b_k * b_k
        if MEAN is not None:  # the variance does not depend on the mean
            p_mean = MEAN + (i_b * (n_h // group) + i_h // group) * d + o_d
            b_k -= tl.load(p_mean, mask=o_d < d, other=0.0)[None, :]
        # TF32 would change ranks.
        b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision="ieee")
        if Q_SQUARES is not None:
            b_q2 = tl.load(Q_SQUARES + p_q, mask=m_qd, other=0.0) * (scale * scale)
            b_v = tl.maximum(tl.load(K_SQUARES + p_k, mask=m_kd, other=0.0) - b_v, 0.0)
            b_variance = tl.dot(b_q2, tl.trans(b_v), b_variance, input_precision="ieee")
    if Q_SQUARES is not None:
        gain = tl.sqrt(b_variance * most) - most / 2
        b_s += tl.where(b_variance <= most, b_variance / 2, gain)
    p_out = ((i_b * n_h + i_h).to(tl.int64) * n_q + o_q)[:, None] * n_k + o_k[None, :]
    tl.store(OUT + p_out, b_s, mask=m_q[:, None] & m_k[None, :])


def scores_launch(
    q: Tensor,
    k: Tensor,
    squares: tuple[Tensor, Tensor] | None,
    mean: Tensor | None,
    out: Tensor,
    *,
    scale: float,
    block_k: int,
) -> Launch:
    """Return the launch that fills `out`. All tensors are fp32 and contiguous.

    Args:
        q: means of query blocks, `[B, Hq, T_q, D]`.
        k: means of key blocks, `[B, Hkv, T_k, D]`.
        squares: mean squares of q and k, of the same shapes; None: no spread.
        mean: mean of all keys, `[B, Hkv, 1, D]`, subtracted from `k`; None: not subtracted.
        out: output, `[B, Hq, T_q, T_k]`.
        scale: factor of the dot products.
        block_k: tokens per key block.
    """
    batch, heads, n_q, d = q.shape
    n_k = k.shape[2]
    tiles = -(-n_q // TILE) * -(-n_k // TILE)
    return Launch(
        kernel=scores_kernel,
        grid=(tiles, heads, batch),
        arguments={
            "Q": q,
            "K": k,
            "Q_SQUARES": None if squares is None else squares[0],
            "K_SQUARES": None if squares is None else squares[1],
            "MEAN": mean,
            "OUT": out,
            "n_q": n_q,
            "n_k": n_k,
            "d": d,
            "group": heads // k.shape[1],
            "scale": float(scale),
            "most": 2 * math.log(block_k),
        },
        constants={"TQ": TILE, "TK": TILE, "TD": TILE_D},
        num_warps=8,
        num_stages=2,
    )
