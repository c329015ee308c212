"""Public attention functions: they check the arguments, choose the backend, and call one operator."""

import math
import os
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._triton import has_triton_package

from dit_accel.kernels import flex
from dit_accel.kernels.block_sparse.library import sparse_linear
from dit_accel.kernels.launch import runs_here
from dit_accel.kernels.linear.features import FEATURE_MAPS, FeatureMap
from dit_accel.kernels.linear.mix import Mix, mixed
from dit_accel.kernels.linear.state import LinearState
from dit_accel.kernels.lists import reads_freely
from dit_accel.kernels.plan import SparsePlan
from dit_accel.kernels.precision import autocast_inputs

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256

Backend = Literal["triton", "torch", "flex"]
Combine = Literal["none", "shared_softmax", "proj", "alpha"]
LinearScope = Literal["marginal", "complement", "all"]


def block_sparse_attention(
    q: Float[Tensor, "b h_q l_q d"],
    k: Float[Tensor, "b h_kv l_k d"],
    v: Float[Tensor, "b h_kv l_k d_v"],
    plan: SparsePlan,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> (
    Float[Tensor, "b h_q l_q d_v"]
    | tuple[Float[Tensor, "b h_q l_q d_v"], Float[Tensor, "b h_q l_q"]]
):
    """Return exact softmax attention over the keys that a plan reads. Differentiable.

    Args:
        q: queries `[B, Hq, Lq, D]` in fp16, bf16, fp32 or fp64. D is at most 256; any strides.
        k, v: keys and values `[B, Hkv, Lk, D]`. `Hq` is a multiple of `Hkv`; `Lq` and `Lk` may differ.
        plan: key blocks to read (`SparsePlan`), made for these lengths. It has lists for each of the `Hq` heads, for each
            of the `Hkv` heads, or one set for all. If the query heads of a group share lists, the torch backend gathers
            keys once for the group, and the Triton backend loads them once for as many heads as fit in a tile.
        scale: factor of the dot products. Default: `D ** -0.5`.
        return_lse: also return the natural log-sum-exp of each row, `[B, Hq, Lq]`, fp32 (fp64 for
            fp64), differentiable. A query without any key has o = 0 and lse = -inf.
        backend: "triton" (default on a GPU), "torch" (default on other devices and for fp64) or "flex", which
            compiles torch's FlexAttention and takes only plans without `columns` and `q_order`.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the plan is for other lengths. The message
            names the argument. Numbers inside the plan are checked on a CPU, and on other devices with
            `DIT_ACCEL_DEBUG=1`.
    """
    q, k, v = _inputs(q, k, v)
    scale = _check(q, k, v, plan, scale, shared=True)
    training = _wants_grad(q, k, v)
    if training or backend == "flex":
        plan = plan.for_heads(q.shape[1])
    if training or backend == "flex":
        plan = plan.listed()
    if backend == "flex":
        flex.check(plan)
    o, lse, _, _ = sparse_linear(
        q,
        k,
        v,
        plan,
        scale=scale,
        want_lse=return_lse or training,
        training=training,
        backend=_backend(q, backend),
    )
    return (o, lse) if return_lse else o


def sparse_linear_attention(
    q: Float[Tensor, "b h_q l_q d"],
    k: Float[Tensor, "b h_kv l_k d"],
    v: Float[Tensor, "b h_kv l_k d_v"],
    plan: SparsePlan,
    *,
    combine: Combine = "shared_softmax",
    feature_map: FeatureMap = "softmax",
    linear_scope: LinearScope = "complement",
    proj_weight: Float[Tensor, "d_v d_v"] | None = None,
    proj_bias: Float[Tensor, " d_v"] | None = None,
    alpha: Float[Tensor, " h_q"] | Float[Tensor, "b_alpha h_q n_q"] | None = None,
    state: LinearState | None = None,
    scale: float | None = None,
    backend: Backend | None = None,
) -> Float[Tensor, "b h_q l_q d_v"]:
    """Return sparse-linear attention (SLA, arXiv 2509.24006): the plan's blocks exactly, the rest summarised.

    O_s is the attention over the blocks read (README.md, equation 1). O_l is the linear attention over the
    linear set (equation 3). Differentiable in every tensor but the plan and `state`.

    Args:
        q, k, v, plan, scale, backend: as in `block_sparse_attention`. Plans with positions
            (`causal`, `window`) or `columns` need `combine="none"`, because the summary of a block has
            no single position.
        combine: formula of the output. `"none"`: O_s. `"shared_softmax"` (training-free): each unread
            block j enters the same softmax as `n_j * exp(scale * q . mean(K_j))` with the value
            `mean(V_j)`. `"proj"` (SLA): O_s + Linear(O_l). `"alpha"` (SLA2): alpha O_s + (1 - alpha) O_l.
        feature_map: feature map of the linear branch, applied to unscaled q and k: `"softmax"` over D,
            `"elu"` (+ 1) or `"relu"`.
        linear_scope: keys that O_l sums over. `"complement"`: all keys that are not read. `"marginal"`:
            the complement without the plan's skip lists. `"all"`: every key, with 1e-5 in the
            denominator, as in the training of the released TurboDiffusion checkpoints.
        proj_weight, proj_bias: weight and bias of a `torch.nn.Linear(Dv, Dv)`, for `"proj"`.
        alpha: share of O_s, `[Hq]` or per query block `[B|1, Hq, T_q]`, for `"alpha"`. A row whose linear
            set is empty uses 1.
        state: sums over all keys, kept up to date by the caller. Default: they are computed from the keys. Inference
            only.

    Raises:
        ValueError: as in `block_sparse_attention`; or an argument is missing for `combine`, or not accepted with it.
    """
    q, k, v = _inputs(q, k, v)
    scale = _check(q, k, v, plan, scale)
    _check_combine(q, v, plan, combine, feature_map, linear_scope, proj_weight, proj_bias, alpha)
    if backend == "flex":
        flex.check(plan)
    plan = plan.listed()
    linear = combine in ("proj", "alpha")
    _check_state(state, q, k, v, feature_map, linear)
    mix = Mix(proj_weight, proj_bias, alpha) if linear else None
    weights = [x for x in (proj_weight, proj_bias, alpha) if x is not None]
    through_qkv = _wants_grad(q, k, v)
    training = through_qkv or _wants_grad(*weights)
    o, _, o_l, _ = sparse_linear(
        q,
        k,
        v,
        plan,
        scale=scale,
        want_lse=through_qkv,
        training=through_qkv,
        shared_softmax=combine == "shared_softmax",
        feature_map=feature_map if linear else None,
        linear_scope=linear_scope,
        state=None if state is None else (state.kv, state.k),
        mix=None if training else mix,
        backend=_backend(q, backend),
    )
    if mix is None or not training:
        return o
    return mixed(o, o_l, mix, plan, linear_scope)


def _backend(q: Tensor, backend: Backend | None) -> str:
    if backend not in (None, *get_args(Backend)):
        raise ValueError(f"backend={backend!r}: accepted are {get_args(Backend)} and None")
    triton_ready = runs_here(q)
    if backend is None:
        return "triton" if triton_ready else "torch"
    if backend == "triton" and not triton_ready and not _interpreting():
        raise ValueError(
            f"backend='triton': accepted on a GPU with triton, for fp16, bf16 and fp32; q is {q.dtype} on {q.device}"
        )
    return backend


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and has_triton_package()


def _wants_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Return q, k and v, cast to the dtype of autocast if it is on."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: a {type(x).__name__}; accepted is a torch.Tensor")
        if not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None:
            raise ValueError(f"{name}: has a forward-mode tangent; accepted is reverse mode only")
    return autocast_inputs(q, k, v)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    scale: float | None,
    *,
    shared: bool = False,
) -> float:
    """Check the arguments and return the scale to use.

    Args:
        shared: accept a plan whose lists the query heads of a group share.
    """
    if not isinstance(plan, SparsePlan):
        raise ValueError(f"plan: a {type(plan).__name__}; accepted is a SparsePlan")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}: shape {tuple(x.shape)}; accepted is [B, H, L, D]")
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            raise ValueError(
                f"{name}: dtype {x.dtype}, and q has {q.dtype}; accepted is one of fp16, bf16, fp32, "
                "fp64, the same for q, k, v"
            )
        if x.device != q.device:
            raise ValueError(f"{name}: on {x.device}, but q is on {q.device}")
        if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name}: head_dim {x.shape[-1]}; accepted is between 1 and {MAX_HEAD_DIM}"
            )
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"v: shape {tuple(v.shape)} does not fit k {tuple(k.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"k: shape {tuple(k.shape)} does not fit q {tuple(q.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q: {q.shape[1]} heads, which is no multiple of the {k.shape[1]} heads of k; "
            "accepted is the layout [B, H, L, D]"
        )
    if (plan.q_len, plan.kv_len) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"plan: made for {plan.q_len} queries and {plan.kv_len} keys, "
            f"but q has {q.shape[2]} and k has {k.shape[2]}"
        )
    for name, batch, heads in plan.leading_sizes():
        # Symbolic sizes are compared one by one: `in` would treat equal sizes as different.
        fits = heads == 1 or heads == q.shape[1] or (shared and heads == k.shape[1])
        if (batch != 1 and batch != q.shape[0]) or not fits:
            raise ValueError(
                f"plan: {name} made for batch {batch} and {heads} heads, "
                f"but q has batch {q.shape[0]} and {q.shape[1]} heads"
            )
    if plan.device != q.device:
        raise ValueError(f"plan: on {plan.device}, but q is on {q.device}; use plan.to(q.device)")
    if reads_freely(q) or os.environ.get("DIT_ACCEL_DEBUG") == "1":
        plan.check_numbers()
    if scale is None:
        return q.shape[-1] ** -0.5
    if not 0 < abs(scale) < math.inf:
        raise ValueError(f"scale={scale}: accepted is a finite number other than 0")
    return float(scale)


def _check_combine(
    q: Tensor,
    v: Tensor,
    plan: SparsePlan,
    combine: str,
    feature_map: str,
    linear_scope: str,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    alpha: Tensor | None,
) -> None:
    for name, value, accepted in (
        ("combine", combine, get_args(Combine)),
        ("feature_map", feature_map, FEATURE_MAPS),
        ("linear_scope", linear_scope, get_args(LinearScope)),
    ):
        if value not in accepted:
            raise ValueError(f"{name}={value!r}: accepted are {', '.join(map(repr, accepted))}")
    if combine != "none" and (plan.positional or plan.columns is not None):
        kind = "causal" if plan.positional else "with columns"
        raise ValueError(
            f"combine={combine!r}: the plan is {kind}, but a block's summary has no single position; "
            "accepted is combine='none'"
        )
    d_v, heads = v.shape[-1], q.shape[1]
    for name, x, owner, shapes in (
        ("proj_weight", proj_weight, "proj", ((d_v, d_v),)),
        ("proj_bias", proj_bias, "proj", ((d_v,),)),
        (
            "alpha",
            alpha,
            "alpha",
            ((heads,), *((b, heads, plan.num_q_blocks) for b in (1, q.shape[0]))),
        ),
    ):
        if x is None:
            if owner == combine and name != "proj_bias":
                raise ValueError(f"{name}: missing; combine={combine!r} needs it")
        elif owner != combine:
            raise ValueError(
                f"{name}: given with combine={combine!r}; accepted with combine={owner!r}"
            )
        elif not any(_same(x.shape, shape) for shape in shapes):
            raise ValueError(
                f"{name}: shape {tuple(x.shape)}; accepted is {' or '.join(map(str, dict.fromkeys(shapes)))}"
            )
        elif x.device != q.device:
            raise ValueError(f"{name}: on {x.device}, but q is on {q.device}")


def _same(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Compare two shapes size by size, because symbolic sizes do not compare inside tuples."""
    return len(shape) == len(other) and all(a == b for a, b in zip(shape, other, strict=True))


def _check_state(
    state: LinearState | None, q: Tensor, k: Tensor, v: Tensor, feature_map: str, linear: bool
) -> None:
    if state is None:
        return
    if not linear:
        raise ValueError(
            "state: given without a linear branch; accepted with combine='proj' or 'alpha'"
        )
    if state.feature_map != feature_map:
        raise ValueError(
            f"state: made with feature_map={state.feature_map!r}, but the call has feature_map={feature_map!r}; "
            "accepted is the same"
        )
    expected = (*k.shape[:2], k.shape[-1], v.shape[-1])
    if not _same(state.kv.shape, expected) or not _same(state.k.shape, expected[:3]):
        raise ValueError(
            f"state: kv {tuple(state.kv.shape)} and k {tuple(state.k.shape)}; "
            f"accepted are {expected} and {expected[:3]}"
        )
    for x in (state.kv, state.k):
        if x.device != q.device:
            raise ValueError(f"state: on {x.device}, but q is on {q.device}")
    if _wants_grad(q, k, v, state.kv, state.k):
        raise ValueError(
            "state: given for a call with gradients, but it has none; accepted at inference"
        )
