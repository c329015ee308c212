"""Backward pass of the Triton backend: gradients of q, k and v."""

import math
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.backward_columns import columns_kernel, gathered_kernel
from dit_accel.kernels.block_sparse.backward_rows import rows_kernel
from dit_accel.kernels.block_sparse.problem import Problem, Run
from dit_accel.kernels.block_sparse.tiles import Target
from dit_accel.kernels.block_sparse.triton_forward import LOG2E, fuses
from dit_accel.kernels.launch import Launch
from dit_accel.kernels.linear import torch_gradients
from dit_accel.kernels.linear.columns_kernel import linear_columns_kernel
from dit_accel.kernels.linear.spec import Linear
from dit_accel.kernels.lists import Lists, block_lists
from dit_accel.kernels.plan import SparsePlan


def backward(
    grad_o: Tensor,
    grad_lse: Tensor | None,
    grad_o_l: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    o: Tensor,
    lse: Tensor,
    o_l: Tensor,
    norm: Tensor,
    *,
    scale: float,
    shared_softmax: bool,
    linear: Linear | None,
    target: Target | None = None,
    run: Run = Launch.__call__,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    target = target or Target.of(q.device)
    if linear is not None and not fuses(q, v):
        saved = (q, k, v, plan, o, lse, o_l, norm)
        exact: dict[str, Any] = {"scale": scale, "shared_softmax": shared_softmax, "linear": None}
        grads = backward(grad_o, grad_lse, None, *saved, target=target, run=run, **exact)
        if grad_o_l is None:
            return grads
        more = torch_gradients.backward(grad_o_l, q, k, v, plan, o_l, norm, linear)
        return grads[0] + more[0], grads[1] + more[1], grads[2] + more[2]
    p = Problem(q, k, v, plan, shared_softmax, linear, target, run)
    grad_o = grad_o.contiguous()
    delta, term = norm.new_empty(q.shape[:3]), torch.empty_like(norm)
    grad_q = q.new_empty(q.shape)
    if linear is not None:
        grad_o_l = torch.zeros_like(o) if grad_o_l is None else grad_o_l.contiguous()
    key_side = p.key_totals()
    shared = {
        "Q": q,
        "K": k,
        "V": v,
        "LSE": lse,
        "GRAD_O": grad_o,
        "DELTA": delta,
        **p.strides,
        **p.rules(),
        "scale": scale * LOG2E,
        "out_scale": scale,
    }
    branch = {
        "GRAD_O_L": grad_o_l if linear is not None else None,
        "NORM": norm if linear is not None else None,
        "TERM": term if linear is not None else None,
        "per_key": p.per_key,
        "n_keys": float(plan.kv_len),
    }
    constants, options = p.constants("rows")
    extra_keys = p.extra_key_arguments()
    run(
        Launch(
            rows_kernel,
            (plan.num_q_blocks * math.ceil(plan.block_q / constants["TQ"]), p.heads, p.batch),
            {
                **shared,
                **branch,
                "O": o,
                "GRAD_LSE": None if grad_lse is None else grad_lse.contiguous(),
                "GRAD_Q": grad_q,
                "O_L": o_l if linear is not None else None,
                **p.row_lists(),
                **extra_keys,
                "COLUMN_NUM": p.column_counts(),
                **key_side,
                "n_q": plan.num_q_blocks,
            },
            {**constants, **p.linear_constants(), "EXTRA_KEYS": p.extra_keys},
            **options,
        )
    )
    gathered = _gathered_gradients(p, shared, extra_keys) if p.extra_keys else None
    # The gradients of columns are added to those of the lists. Both stay in fp32 until then.
    grad_dtype = torch.float32 if p.extra_keys == 1 else k.dtype
    grad_k = k.new_empty(k.shape, dtype=grad_dtype)
    grad_v = v.new_empty(v.shape, dtype=grad_dtype)
    means = gathered if p.extra_keys == 2 else None
    if linear is not None:
        assert grad_o_l is not None
        _linear_key_gradients(p, grad_k, grad_v, grad_o_l, norm, term)
    constants, options = p.constants("columns")
    full, partial = _transposed(plan)
    run(
        Launch(
            columns_kernel,
            (plan.num_k_blocks * math.ceil(plan.block_k / constants["TK"]), p.kv_heads, p.batch),
            {
                **shared,
                "GRAD_K": grad_k,
                "GRAD_V": grad_v,
                **p.lists(full=full, part=partial),
                "GRAD_CENTROID_K": None if means is None else means[0],
                "GRAD_CENTROID_V": None if means is None else means[1],
            },
            {**constants, "ADD": linear is not None},
            **options,
        )
    )
    if p.extra_keys == 1:
        assert gathered is not None
        _add_columns(p, grad_k, gathered[0])
        _add_columns(p, grad_v, gathered[1])
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _linear_key_gradients(
    p: Problem, grad_k: Tensor, grad_v: Tensor, grad_o_l: Tensor, norm: Tensor, term: Tensor
) -> None:
    """Write the contribution of the linear branch to grad_k and grad_v."""
    assert p.linear is not None
    plan = p.plan
    queries = {"K_SIZES": None, "KV_LENGTHS": None}
    want_phi = p.mode >= 2
    phi_q, *sums = p.parts(p.q, grad_o_l, queries, norm=norm, term=term, want_phi=want_phi)
    state, state_z = p.totals((sums[0], sums[1]))
    rows, heavy = _rows_by_block(p) if p.mode >= 2 else (None, None)
    constants, options = p.constants("linear_columns")
    for name in ("POSITIONAL", "WINDOW"):
        del constants[name]
    p.run(
        Launch(
            linear_columns_kernel,
            (plan.num_k_blocks * math.ceil(plan.block_k / constants["TK"]), p.kv_heads, p.batch),
            {
                "K": p.k,
                "V": p.v,
                "GRAD_K": grad_k,
                "GRAD_V": grad_v,
                **p.lists(torch.Size((p.batch, p.heads)), row=rows),
                "HEAVY": heavy,
                "PHI_Q": phi_q,
                "STATE": state,
                "STATE_Z": state_z,
                "GRAD_O_L": grad_o_l,
                "NORM": norm,
                "TERM": term,
                **{name: x for name, x in p.strides.items() if not name.startswith("q")},
                **p.key_rules(),
                **p.row_rules(),
                "n_k": plan.num_k_blocks,
                "group": p.heads // p.kv_heads,
                "per_key": p.per_key,
                "n_keys": float(plan.kv_len),
            },
            {**constants, **p.linear_constants(), "LINEAR": min(p.mode, 2)},
            **options,
        )
    )


def _rows_by_block(p: Problem) -> tuple[Lists, Tensor]:
    """Return the query blocks that the linear branch reads for each key block, `[B, Hq, T_k]`, and the mask of heavy key
    blocks, `[B, Hkv, T_k]`.

    The linear sets of half of the rows or more do not hold a heavy block. It sums the rows whose linear set holds it.
    Other blocks subtract the rows whose linear set does not hold them.
    """
    assert p.linear is not None
    summed = p.plan.linear_blocks(p.linear.scope).mT  # [B|1, Hq|1, T_k, T_q]
    groups = summed.expand(p.batch, p.heads, -1, -1).unflatten(1, (p.kv_heads, -1))
    heavy = 2 * (~groups).sum((2, 4)) >= groups.shape[2] * p.plan.num_q_blocks
    listed = torch.where(heavy[:, :, None, :, None], groups, ~groups).flatten(1, 2)
    return block_lists(listed), heavy.to(torch.int32)


def _transposed(plan: SparsePlan) -> tuple[Lists, Lists | None]:
    """Return the query blocks that read each key block, in full and in part.

    Without positions, all of them are on the full lists, because padding is masked once per tile.
    """
    if plan.positional:
        lists = plan.transpose()
        return lists.full, lists.partial
    return block_lists(plan.to_block_mask().mT), None


def _gathered_gradients(
    p: Problem, shared: dict[str, Any], extra_keys: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the extra keys: means `[B, Hkv, T_k, D]`, columns `[B, Hq, C, D]`; fp32."""
    plan = p.plan
    constants, options = p.constants("columns")
    n = plan.num_k_blocks if p.extra_keys == 2 else extra_keys["n_columns"]
    tiles = math.ceil(n / constants["TK"])
    wanted = max(1, min(4, math.ceil(256 / (tiles * p.heads * p.batch))))
    span = math.ceil(plan.num_q_blocks / wanted)
    parts = math.ceil(plan.num_q_blocks / span)
    shape = (parts, p.batch, p.heads, n)
    grad_k = p.q.new_empty(*shape, p.head_dim, dtype=torch.float32)
    grad_v = p.q.new_empty(*shape, p.value_dim, dtype=torch.float32)
    p.run(
        Launch(
            gathered_kernel,
            (tiles * parts, p.heads, p.batch),
            {
                **shared,
                "GRAD_X_K": grad_k,
                "GRAD_X_V": grad_v,
                **extra_keys,
                **p.list_strides(),
                "n_q": plan.num_q_blocks,
                "span": span,
            },
            {**constants, "EXTRA_KEYS": p.extra_keys},
            **options,
        )
    )
    grad_k, grad_v = grad_k.sum(0), grad_v.sum(0)
    if p.extra_keys == 2:
        grad_k, grad_v = (
            x.unflatten(1, (p.kv_heads, -1)).sum(2).contiguous() for x in (grad_k, grad_v)
        )
    return grad_k, grad_v


def _add_columns(p: Problem, grad: Tensor, of_columns: Tensor) -> None:
    """Add gradients of columns `[B, Hq, C, D]` to those of the keys `[B, Hkv, Lk, D]`, one query head at a time.

    The columns of one head are distinct keys, so the order of additions is fixed.
    """
    assert p.plan.columns is not None
    columns = p.plan.columns.expand(p.batch, p.heads, -1).long()
    valid = columns < p.plan.kv_len
    index = columns.clamp(max=p.plan.kv_len - 1)[..., None].expand_as(of_columns)
    values = of_columns.masked_fill(~valid[..., None], 0.0)
    group = p.heads // p.kv_heads
    for g in range(group):
        grad.scatter_add_(2, index[:, g::group], values[:, g::group])
