"""`window_attention`: attention of layers with a sliding window, at the cost of the window."""

import torch
from jaxtyping import Float
from torch import Tensor

from dit_accel.kernels import SparsePlan, block_sparse_attention
from dit_accel.llm.dense import dense_attention


def window_attention(
    q: Float[Tensor, "b h_q l_q d"],
    k: Float[Tensor, "b h_kv l_k d"],
    v: Float[Tensor, "b h_kv l_k d_v"],
    *,
    scale: float,
    window: int,
    block: int,
) -> Float[Tensor, "b h_q l_q d_v"]:
    """Return the exact attention of queries that see the last `window` keys.

    A GPU runs a block-sparse plan. A CPU runs chunks of dense attention on the keys of the window, which was measured
    to be faster there (`kernels/bench_window.py`).

    Args:
        q: queries `[B, Hq, Lq, D]`, the last Lq of the Lk positions.
        k, v: keys and values `[B, Hkv, Lk, D]`.
        scale: factor of the dot products.
        window: keys that a query sees, counted back from its own position.
        block: tokens per block of the plan.
    """
    if not q.is_cuda:
        return dense_attention(q, k, v, scale=scale, window=window)
    plan = window_plan(q.shape[2], k.shape[2], window=window, block=block, device=q.device)
    out = block_sparse_attention(q, k, v, plan, scale=scale)
    assert isinstance(out, Tensor)
    return out


def window_plan(
    q_len: int, kv_len: int, *, window: int, block: int, device: torch.device | str = "cpu"
) -> SparsePlan:
    """Return the plan that reads the last `window` keys of each query, exactly."""
    every = torch.ones(1, 1, -(-q_len // block), -(-kv_len // block), dtype=torch.bool)
    return SparsePlan.from_block_mask(
        every.to(device),
        block_q=block,
        block_k=block,
        q_len=q_len,
        kv_len=kv_len,
        causal=True,
        q_offset=kv_len - q_len,
        window=window,
    )


def window_density(q_len: int, kv_len: int, window: int) -> float:
    """Return the pairs that a window shows, over those that a causal call reads."""

    def pairs(first: int, stop: int) -> int:
        """Sum of the integers in [first, stop)."""
        return (stop * (stop - 1) - first * (first - 1)) // 2

    begin = kv_len - q_len + 1  # keys of the first query
    cut = min(max(begin, window), kv_len + 1)  # from here on a query sees `window` keys
    shown = pairs(begin, cut) + (kv_len + 1 - cut) * window
    return shown / pairs(begin, kv_len + 1)
