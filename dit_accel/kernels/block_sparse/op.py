"""The public functions: check the arguments, choose the backend."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dit_accel.kernels.block_sparse.torch_backend import BlockSparse
from dit_accel.kernels.plan import SparsePlan

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def block_sparse_attention(
    q: Float[Tensor, "b h_q l_q d"],
    k: Float[Tensor, "b h_kv l_k d"],
    v: Float[Tensor, "b h_kv l_k d_v"],
    plan: SparsePlan,
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> (
    Float[Tensor, "b h_q l_q d_v"]
    | tuple[Float[Tensor, "b h_q l_q d_v"], Float[Tensor, "b h_q l_q"]]
):
    """Exact softmax attention over the key blocks of a plan. Differentiable.

    Args:
        q: `[B, Hq, Lq, D]`, fp16, bf16, fp32 or fp64, any strides.
        k, v: `[B, Hkv, Lk, D]`; `Hq` a multiple of `Hkv`, `Lq != Lk` is fine.
        plan: for these lengths, see `SparsePlan`.
        scale: of the dot products. Default: `D ** -0.5`.
        return_lse: also return the natural log-sum-exp of each row, `[B, Hq, Lq]`, fp32 (fp64 for
            fp64), differentiable. A query without any key has o = 0 and lse = -inf.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; it names the argument.
    """
    o, lse = _run(q, k, v, plan, scale, shared_softmax=False, want_lse=return_lse)
    return (o, lse) if return_lse else o


def sparse_linear_attention(
    q: Float[Tensor, "b h_q l_q d"],
    k: Float[Tensor, "b h_kv l_k d"],
    v: Float[Tensor, "b h_kv l_k d_v"],
    plan: SparsePlan,
    *,
    combine: Literal["none", "shared_softmax"] = "shared_softmax",
    scale: float | None = None,
) -> Float[Tensor, "b h_q l_q d_v"]:
    """Exact attention over the plan's blocks, the unread ones summarised. Differentiable.

    Args:
        q, k, v, plan, scale: as in `block_sparse_attention`.
        combine: `"none"` drops unread blocks. `"shared_softmax"` lets each unread block j enter
            the same softmax as `n_j * exp(scale * q . mean(K_j))` with the value `mean(V_j)`
            (training-free; not for causal plans).
    """
    if combine not in ("none", "shared_softmax"):
        raise ValueError(f"combine={combine!r}: accepted are 'none' and 'shared_softmax'")
    shared = combine == "shared_softmax"
    if shared and plan.positional:
        raise ValueError(
            "combine='shared_softmax': a block mean cannot be causal; use combine='none' with this plan"
        )
    return _run(q, k, v, plan, scale, shared_softmax=shared, want_lse=False)[0]


def _run(q, k, v, plan, scale, *, shared_softmax, want_lse):
    _check(q, k, v, plan)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    # The one seam for further backends (Triton): by device and capability, with these arguments.
    return BlockSparse.apply(q, k, v, plan, scale, shared_softmax, want_lse)


def _check(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}: shape {tuple(x.shape)}; accepted is [B, H, L, D]")
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            raise ValueError(
                f"{name}: dtype {x.dtype}; accepted is one of fp16, bf16, fp32, fp64, the same for q, k, v"
            )
        if x.device != q.device:
            raise ValueError(f"{name}: on {x.device}, but q is on {q.device}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"v: shape {tuple(v.shape)} does not fit k {tuple(k.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"k: shape {tuple(k.shape)} does not fit q {tuple(q.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q: {q.shape[1]} heads, which is no multiple of the {k.shape[1]} heads of k"
        )
    if (plan.q_len, plan.kv_len) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"plan: made for {plan.q_len} queries and {plan.kv_len} keys, "
            f"but q has {q.shape[2]} and k has {k.shape[2]}"
        )
    b, h = plan.kv_num_blocks.shape[:2]
    if b not in (1, q.shape[0]) or h not in (1, q.shape[1]):
        raise ValueError(
            f"plan: made for batch {b} and {h} heads, but q has batch {q.shape[0]} and {q.shape[1]} heads"
        )
    if plan.device != q.device:
        raise ValueError(f"plan: on {plan.device}, but q is on {q.device}; use plan.to(q.device)")
