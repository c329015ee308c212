"""Dense attention in Triton with the loop of the sparse forward kernel: the baseline for the rate per attended pair."""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import Launch


class DenseTile(NamedTuple):
    """Tile sizes and launch options of the dense kernel."""

    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def label(self) -> str:
        return f"{self.queries}x{self.keys} w{self.warps} s{self.stages}"


TILES = (DenseTile(128, 64, 8, 3), DenseTile(128, 128, 8, 3), DenseTile(128, 128, 8, 2))


@triton.jit
def dense_kernel(
    Q, K, V, O, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, o_b, o_h, o_l, q_len, k_len, scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Compute o = softmax(scale q k^T) v for one tile of queries of one head. `scale` includes log2(e)."""
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # Rows start at multiples of 16 bytes, which the compiler cannot know from the strides.
    q_l, k_l, v_l, o_l = q_l // 8 * 8, k_l // 8 * 8, v_l // 8 * 8, o_l // 8 * 8
    Q += i_b.to(tl.int64) * (q_b // 8 * 8) + i_h.to(tl.int64) * (q_h // 8 * 8)
    K += i_b.to(tl.int64) * (k_b // 8 * 8) + i_h.to(tl.int64) * (k_h // 8 * 8)
    V += i_b.to(tl.int64) * (v_b // 8 * 8) + i_h.to(tl.int64) * (v_h // 8 * 8)
    O += i_b.to(tl.int64) * (o_b // 8 * 8) + i_h.to(tl.int64) * (o_h // 8 * 8)
    o_m, o_n, o_d = i_m * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    # [BM, D]
    b_q = tl.load(Q + o_m[:, None].to(tl.int64) * q_l + o_d, mask=o_m[:, None] < q_len, other=0.0)
    b_o = tl.zeros([BM, D], tl.float32)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    p_k = K + o_n[:, None].to(tl.int64) * k_l + o_d
    p_v = V + o_n[:, None].to(tl.int64) * v_l + o_d
    whole = k_len // BN * BN
    for _ in tl.range(0, whole, BN):
        b_k, b_v = tl.load(p_k), tl.load(p_v)
        b_o, b_max, b_sum = _step(tl.dot(b_q, tl.trans(b_k)), b_v, b_o, b_max, b_sum, scale)
        p_k += BN * k_l
        p_v += BN * v_l
    if whole < k_len:
        m_n = whole + o_n < k_len
        b_k = tl.load(p_k, mask=m_n[:, None], other=0.0)
        b_v = tl.load(p_v, mask=m_n[:, None], other=0.0)
        b_s = tl.where(m_n[None, :], tl.dot(b_q, tl.trans(b_k)), float("-inf"))
        b_o, b_max, b_sum = _step(b_s, b_v, b_o, b_max, b_sum, scale)
    p_o = O + o_m[:, None].to(tl.int64) * o_l + o_d
    tl.store(p_o, (b_o / b_sum[:, None]).to(O.dtype.element_ty), mask=o_m[:, None] < q_len)


@triton.jit
def _step(b_s, b_v, b_o, b_max, b_sum, scale):
    """Add one tile of scores `[BM, BN]` to the online softmax."""
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
    b_p = tl.exp2(b_s * scale - b_new[:, None])
    b_factor = tl.exp2(b_max - b_new)
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_factor[:, None])
    return b_o, b_new, b_sum * b_factor + tl.sum(b_p, 1)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, tile: DenseTile) -> Tensor:
    """Return dense attention.

    Args:
        q, k, v: `[B, H, L, D]` in fp16 or bf16. D is a power of two, at least 16; strides are multiples of 8.
        tile: tile sizes and launch options.

    Raises:
        ValueError: the kernel does not support the head_dim or the strides.
    """
    batch, heads, length, d = q.shape
    o = torch.empty_like(q)
    strides = {
        f"{name}_{axis}": x.stride(i)
        for name, x in (("q", q), ("k", k), ("v", v), ("o", o))
        for i, axis in enumerate("bhl")
    }
    if d < 16 or d & (d - 1) or any(x % 8 for x in strides.values()):
        raise ValueError(
            f"q: head_dim {d}, strides {strides}; accepted are head_dims that are powers of two from 16 on, and strides "
            "that are multiples of 8"
        )
    arguments: dict[str, Any] = {"Q": q, "K": k, "V": v, "O": o, **strides}
    arguments |= {"q_len": length, "k_len": k.shape[2], "scale": d**-0.5 * math.log2(math.e)}
    Launch(
        kernel=dense_kernel,
        grid=(-(-length // tile.queries), heads, batch),
        arguments=arguments,
        constants={"D": d, "BM": tile.queries, "BN": tile.keys},
        num_warps=tile.warps,
        num_stages=tile.stages,
    )()
    return o
