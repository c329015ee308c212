"""`window_attention`: exact sliding-window attention whose cost grows with the window, not with the sequence."""

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
    """Return exact attention in which each query sees the last `window` keys.

    On a GPU this runs a block-sparse plan. On a CPU it runs dense attention in chunks over the keys of the window, which
    is faster there (`kernels/bench_window.py`).

    Args:
        q: queries `[B, Hq, Lq, D]` at the last Lq of the Lk positions.
        k, v: keys and values `[B, Hkv, Lk, D]`.
        scale: factor of the dot products.
        window: number of keys that a query sees, counted back from its own position.
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
    """Return the plan in which each query reads exactly the last `window` keys."""
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
    """Return the number of visible query-key pairs with a window, divided by the number without."""

    def pairs(first: int, stop: int) -> int:
        """Return the sum of the integers in [first, stop)."""
        return (stop * (stop - 1) - first * (first - 1)) // 2

    begin = kv_len - q_len + 1  # number of keys up to the first query
    cut = min(max(begin, window), kv_len + 1)  # from here, queries see `window` keys
    shown = pairs(begin, cut) + (kv_len + 1 - cut) * window
    return shown / pairs(begin, kv_len + 1)
