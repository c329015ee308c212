"""Operators `dit_accel::sparse_linear`, its backward, and `sparse_linear_inference`, registered with torch.

Operators take tensors and numbers only. A plan is unpacked before the call and rebuilt inside.
"""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.linear.mix import Mix
from dit_accel.kernels.linear.spec import Linear
from dit_accel.kernels.operators import operator
from dit_accel.kernels.plan import SparsePlan
from dit_accel.kernels.precision import no_autocast, wide

# Fields of a plan, in the order of the operators' arguments.
TENSORS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "skip_num_blocks",
    "skip_indices",
    "q_block_sizes",
    "k_block_sizes",
    "kv_lengths",
    "columns",
    "q_order",
    "long_rows",
)
NUMBERS = ("block_q", "block_k", "q_offset", "sink", "window", "row_bound", "causal")
# Tensor arguments between the plan and the numbers: state and mix, for inference only.
OPTIONAL = 2 + len(Mix._fields)


def sparse_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    *,
    scale: float,
    want_lse: bool,
    backend: str,
    shared_softmax: bool = False,
    feature_map: str | None = None,
    linear_scope: str = "complement",
    state: tuple[Tensor, Tensor] | None = None,
    mix: Mix | None = None,
    training: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `o`, `lse`, `o_l` and the reciprocal denominators of `o_l`.

    `lse` is empty without `want_lse`; `o_l` and the denominators are empty without `feature_map`. With `mix` (inference
    only), `o` is the mixed result, and `o_l` and the denominators are empty.

    Args:
        training: use the operator with gradients, which costs 30 us more per call.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    state_kv, state_k = state if state is not None else (None, None)
    call = torch.ops.dit_accel.sparse_linear
    if not training:
        call = torch.ops.dit_accel.sparse_linear_inference
    return call(
        q,
        k,
        v,
        *(getattr(plan, name) for name in TENSORS),
        state_kv,
        state_k,
        *(mix or Mix()),
        *(getattr(plan, name) for name in NUMBERS),
        scale,
        shared_softmax,
        feature_map,
        linear_scope,
        want_lse,
        backend,
    )


def _backend(name: str) -> ModuleType:
    return importlib.import_module(f"dit_accel.kernels.block_sparse.{name}_backend")


def _plan(q: Tensor, k: Tensor, tensors: tuple, numbers: tuple) -> SparsePlan:
    return SparsePlan(
        **dict(zip(TENSORS, tensors, strict=True)),
        **dict(zip(NUMBERS, numbers, strict=True)),
        q_len=q.shape[2],
        kv_len=k.shape[2],
    )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    full_kv_num_blocks: Tensor,
    full_kv_indices: Tensor,
    skip_num_blocks: Tensor | None,
    skip_indices: Tensor | None,
    q_block_sizes: Tensor | None,
    k_block_sizes: Tensor | None,
    kv_lengths: Tensor | None,
    columns: Tensor | None,
    q_order: Tensor | None,
    long_rows: Tensor | None,
    state_kv: Tensor | None,
    state_k: Tensor | None,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    alpha: Tensor | None,
    block_q: int,
    block_k: int,
    q_offset: int,
    sink: int,
    window: int | None,
    row_bound: int | None,
    causal: bool,
    scale: float,
    shared_softmax: bool,
    feature_map: str | None,
    linear_scope: str,
    want_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = (
        kv_num_blocks,
        kv_indices,
        full_kv_num_blocks,
        full_kv_indices,
        skip_num_blocks,
        skip_indices,
        q_block_sizes,
        k_block_sizes,
        kv_lengths,
        columns,
        q_order,
        long_rows,
    )
    numbers = (block_q, block_k, q_offset, sink, window, row_bound, causal)
    plan = _plan(q, k, tensors, numbers)
    state = None if state_kv is None or state_k is None else (state_kv, state_k)
    linear = None if feature_map is None else Linear(feature_map, linear_scope, state)
    mix = Mix(proj_weight, proj_bias, alpha)
    with no_autocast(q):
        return _backend(backend).forward(
            q,
            k,
            v,
            plan,
            scale=scale,
            shared_softmax=shared_softmax,
            linear=linear,
            want_lse=want_lse,
            mix=None if proj_weight is None and alpha is None else mix,
        )


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, feature_map, _, want_lse, _ = rest
    first = len(TENSORS) + 2
    mix = Mix(*rest[first : first + len(Mix._fields)])
    branch = feature_map is not None and mix.proj_weight is None and mix.alpha is None
    dtype = wide(q)
    shape = (*q.shape[:-1], v.shape[-1])
    nothing = (0,)
    return (
        q.new_empty(shape),
        q.new_empty(q.shape[:-1] if want_lse else nothing, dtype=dtype),
        q.new_empty(shape if branch else nothing),
        q.new_empty(q.shape[:-1] if branch else nothing, dtype=dtype),
    )


_trainable = torch.library.custom_op("dit_accel::sparse_linear", _forward, mutates_args=())
_trainable.register_fake(_forward_fake)
operator("sparse_linear_inference", _forward_fake)(_forward)


@torch.library.custom_op("dit_accel::sparse_linear_backward", mutates_args=())
def _backward(
    grad_o: Tensor,
    grad_lse: Tensor | None,
    grad_o_l: Tensor | None,
    o: Tensor,
    lse: Tensor,
    o_l: Tensor,
    norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    full_kv_num_blocks: Tensor,
    full_kv_indices: Tensor,
    skip_num_blocks: Tensor | None,
    skip_indices: Tensor | None,
    q_block_sizes: Tensor | None,
    k_block_sizes: Tensor | None,
    kv_lengths: Tensor | None,
    columns: Tensor | None,
    q_order: Tensor | None,
    long_rows: Tensor | None,
    block_q: int,
    block_k: int,
    q_offset: int,
    sink: int,
    window: int | None,
    row_bound: int | None,
    causal: bool,
    scale: float,
    shared_softmax: bool,
    feature_map: str | None,
    linear_scope: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (
        kv_num_blocks,
        kv_indices,
        full_kv_num_blocks,
        full_kv_indices,
        skip_num_blocks,
        skip_indices,
        q_block_sizes,
        k_block_sizes,
        kv_lengths,
        columns,
        q_order,
        long_rows,
    )
    numbers = (block_q, block_k, q_offset, sink, window, row_bound, causal)
    plan = _plan(q, k, tensors, numbers)
    linear = None if feature_map is None else Linear(feature_map, linear_scope)
    with no_autocast(q):
        return _backend(backend).backward(
            grad_o,
            grad_lse,
            grad_o_l,
            q,
            k,
            v,
            plan,
            o,
            lse,
            o_l,
            norm,
            scale=scale,
            shared_softmax=shared_softmax,
            linear=linear,
        )


@_backward.register_fake
def _backward_fake(
    grad_o, grad_lse, grad_o_l, o, lse, o_l, norm, q, k, v, *rest
) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    n = 3 + len(TENSORS)
    tensors, numbers = inputs[:n], inputs[n + OPTIONAL :]
    ctx.save_for_backward(*output, *tensors)
    *kept, want_lse, backend = numbers
    ctx.numbers = (*kept, backend)
    ctx.set_materialize_grads(False)
    assert want_lse, "lse: empty, but gradients need it"


def _autograd(ctx, grad_o, grad_lse, grad_o_l, grad_norm) -> tuple[Tensor | None, ...]:
    o, lse, o_l, norm, *tensors = ctx.saved_tensors
    grad_o = torch.zeros_like(o) if grad_o is None else grad_o
    grads = torch.ops.dit_accel.sparse_linear_backward(
        grad_o, grad_lse, grad_o_l, o, lse, o_l, norm, *tensors, *ctx.numbers
    )
    # Plan, state, mix and numbers have no gradient.
    return *grads, *[None] * (len(TENSORS) + OPTIONAL + len(ctx.numbers) + 1)


_trainable.register_autograd(_autograd, setup_context=_setup_context)
