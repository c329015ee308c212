"""The linear branch in plain torch, in state space: which blocks a row sums is a matrix product.

Per key block H_j = phi(K_j)^T V_j and Z_j = sum phi(K_j); with W the 0/1 matrix of a row's linear set,
H_i = sum_j W_ij H_j, so nothing is subtracted that would have to cancel. A few heads at a time, so that the
states never take more than `STATE_BYTES`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.linear.features import features, features_backward
from dit_accel.kernels.linear.spec import Linear
from dit_accel.kernels.plan import SparsePlan
from dit_accel.kernels.row_order import in_block_order, in_query_order

# States of all key blocks and of all query blocks of one head count double each in backward.
STATE_BYTES = 2**26


@dataclass
class _Head:
    """One key head and its group of query heads, in blocks; padding holds 0."""

    batch: int
    kv_head: int
    heads: slice
    phi_q: Tensor
    """`[G, T_q * BQ, D]`, or `[G, T_q, BQ, D]` in blocks."""
    phi_k: Tensor
    """`[T_k, BK, D]`."""
    v: Tensor
    """`[T_k, BK, Dv]`."""
    weights: Tensor | None
    """`[G, T_q, T_k]`, 1 where a row sums a block; None: all rows sum all."""


def _padded(x: Tensor, length: int, dtype: torch.dtype, invalid: Tensor | None) -> Tensor:
    """`[..., L, D]` with zeros up to `length` and where invalid `[L]`: padding may hold NaN."""
    x = x.to(dtype)
    if invalid is not None:
        x = x.masked_fill(invalid[:, None], 0.0)
    return x if x.shape[-2] == length else F.pad(x, (0, 0, 0, length - x.shape[-2]))


def _heads(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, linear: Linear) -> Iterator[_Head]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    token = torch.arange(plan.kv_len, device=q.device)
    k_sizes = plan.k_sizes()
    k_invalid = token % plan.block_k >= k_sizes[:, token // plan.block_k]  # [B|1, Lk]
    whole = plan.kv_lengths is None and plan.k_block_sizes is None
    weights = None
    if linear.scope != "all":
        weights = plan.linear_blocks(linear.scope)
        if linear.state is not None:  # what to take off the totals that the caller keeps
            weights = ~weights
    for b in range(q.shape[0]):
        invalid = None if whole else k_invalid[b if len(k_invalid) > 1 else 0]
        for h in range(k.shape[1]):
            heads = slice(h * group, (h + 1) * group)
            of_heads = None
            if weights is not None:
                of_heads = weights[b if len(weights) > 1 else 0]
                of_heads = (of_heads[heads] if len(of_heads) > 1 else of_heads).to(dtype)
                of_heads = of_heads.expand(group, -1, -1)
            keys = _padded(k[b, h], plan.num_k_blocks * plan.block_k, dtype, invalid)
            phi_k = features(keys, linear.feature_map)
            # phi(0) is not 0: padding has to be cleared once more.
            if invalid is not None:
                phi_k[: plan.kv_len].masked_fill_(invalid[:, None], 0.0)
            phi_k[plan.kv_len :] = 0
            values = _padded(v[b, h], len(keys), dtype, invalid)
            yield _Head(
                batch=b,
                kv_head=h,
                heads=heads,
                phi_q=_phi_q(q[b, heads], plan, linear, dtype),
                phi_k=phi_k.unflatten(0, (-1, plan.block_k)),
                v=values.unflatten(0, (-1, plan.block_k)),
                weights=of_heads,
            )


def _q_invalid(plan: SparsePlan) -> Tensor | None:
    if plan.q_block_sizes is None:
        return None
    row = torch.arange(plan.q_len, device=plan.device)
    return row % plan.block_q >= plan.q_sizes()[row // plan.block_q]


def _phi_q(q: Tensor, plan: SparsePlan, linear: Linear, dtype: torch.dtype) -> Tensor:
    invalid = _q_invalid(plan)
    phi = features(_padded(q, plan.q_len, dtype, invalid), linear.feature_map)
    if invalid is not None:
        phi.masked_fill_(invalid[:, None], 0.0)
    return phi


def _row_chunks(head: _Head, plan: SparsePlan) -> Iterator[tuple[slice, slice]]:
    """Query blocks, and their rows, whose states fit together."""
    group, d, d_v = len(head.phi_q), head.phi_k.shape[-1], head.v.shape[-1]
    one = group * d * (d_v + 1) * head.v.itemsize
    step = max(1, STATE_BYTES // one)
    for i in range(0, plan.num_q_blocks, step):
        end = min(i + step, plan.num_q_blocks)
        yield slice(i, end), slice(i * plan.block_q, min(end * plan.block_q, plan.q_len))


def _blocks(x: Tensor, plan: SparsePlan) -> Tensor:
    """Rows `[G, n, D]` of whole query blocks as `[G, n_q, BQ, D]`, zero-padded."""
    pad = -x.shape[1] % plan.block_q
    return (F.pad(x, (0, 0, 0, pad)) if pad else x).unflatten(1, (-1, plan.block_q))


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, linear: Linear
) -> tuple[Tensor, Tensor]:
    """`o_l` `[B, Hq, Lq, Dv]` and 1 / denominator `[B, Hq, Lq]`, 0 where there is nothing to sum."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q = in_block_order(q, plan)
    o_l = q.new_empty(*q.shape[:-1], v.shape[-1])
    norm = q.new_empty(q.shape[:-1], dtype=dtype)
    for head in _heads(q, k, v, plan, linear):
        at = (head.batch, head.heads)
        state = None
        if linear.state is not None:
            kv, total_k = (x[head.batch, head.kv_head].to(dtype) for x in linear.state)
            state = torch.cat([kv, total_k[:, None]], -1)
        for _, rows, states in _row_states(head, plan, state):
            phi = head.phi_q[:, rows]
            if states.ndim == 2:
                sums = phi @ states
            else:
                sums = (_blocks(phi, plan) @ states).flatten(1, 2)[:, : phi.shape[1]]
            total = sums[..., -1]
            if linear.scope == "all":
                total = total + 1e-5
            valid = total > 0
            inverse = torch.where(valid, 1 / torch.where(valid, total, 1.0), 0.0)
            o_l[at][:, rows] = (sums[..., :-1] * inverse[..., None]).to(o_l.dtype)
            norm[at][:, rows] = inverse
        invalid = _q_invalid(plan)
        if invalid is not None:
            norm[at] = norm[at].masked_fill(invalid, 0.0)
    return in_query_order(o_l, plan), in_query_order(norm, plan)


def _row_states(
    head: _Head, plan: SparsePlan, state: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Query blocks, their rows, and [H_i, Z_i] `[D, Dv + 1]` for all or `[G, n, D, Dv + 1]`."""
    everything = slice(0, plan.num_q_blocks), slice(0, plan.q_len)
    if head.weights is None:
        if state is None:
            phi, v = head.phi_k.flatten(0, 1), head.v.flatten(0, 1)
            state = torch.cat([phi.T @ v, phi.sum(0)[:, None]], -1)
        yield *everything, state
        return
    per_block = torch.cat([head.phi_k.mT @ head.v, head.phi_k.sum(1)[..., None]], -1)
    flat = per_block.flatten(1)
    for blocks, rows in _row_chunks(head, plan):
        summed = (head.weights[:, blocks] @ flat).unflatten(-1, per_block.shape[1:])
        yield blocks, rows, summed if state is None else state - summed


def backward(
    grad_o_l: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    o_l: Tensor,
    norm: Tensor,
    linear: Linear,
) -> tuple[Tensor, Tensor, Tensor]:
    """The linear branch's share of the gradients of q, k and v (README.md, equation 5)."""
    dtype = norm.dtype
    grad_o_l, q, o_l, norm = (in_block_order(x, plan) for x in (grad_o_l, q, o_l, norm))
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    q_invalid = _q_invalid(plan)
    for head in _heads(q, k, v, plan, linear):
        at = (head.batch, head.heads)
        g, n = grad_o_l[at].to(dtype), norm[at]
        if q_invalid is not None:
            g = g.masked_fill(q_invalid[:, None], 0.0)
        # A row's gradient of [numerator, denominator].
        term = (g * o_l[at].to(dtype)).sum(-1)
        grad_sums = torch.cat([g, -term[..., None]], -1) * n[..., None]
        grad_phi_q = torch.empty_like(head.phi_q)
        shared = head.weights is None
        grad_state: Tensor | None = None
        for blocks, rows, states in _row_states(head, plan, None):
            phi, gs = head.phi_q[:, rows], grad_sums[:, rows]
            if shared:
                grad_phi_q[:, rows] = gs @ states.mT
                grad_state = (phi.mT @ gs).sum(0)
            else:
                assert head.weights is not None
                by_block = _blocks(gs, plan)
                grad_phi_q[:, rows] = (by_block @ states.mT).flatten(1, 2)[:, : phi.shape[1]]
                of_rows = _blocks(phi, plan).mT @ by_block  # [G, n, D, Dv + 1]
                part = head.weights[:, blocks].flatten(0, 1).T @ of_rows.flatten(0, 1).flatten(1)
                grad_state = part if grad_state is None else grad_state.add_(part)
        assert grad_state is not None
        grad_state = grad_state.view(-1, head.phi_k.shape[-1], head.v.shape[-1] + 1)
        grad_kv, grad_z = grad_state[..., :-1], grad_state[..., -1]
        grad_phi_k = head.v @ grad_kv.mT + grad_z[:, None]
        grad_values = head.phi_k @ grad_kv
        queries = _padded(q[at], plan.q_len, dtype, q_invalid)
        grad_q[at] = features_backward(queries, head.phi_q, grad_phi_q, linear.feature_map).to(
            q.dtype
        )
        phi_k = head.phi_k.flatten(0, 1)[: plan.kv_len]
        at_key = (head.batch, head.kv_head)
        # Where phi(k) was cleared the key is padding: whatever it holds gets no gradient.
        padding = _k_padding(plan, head.batch)
        keys = k[at_key].to(dtype)
        grad_keys = grad_phi_k.flatten(0, 1)[: plan.kv_len]
        grad_values = grad_values.flatten(0, 1)[: plan.kv_len]
        if padding is not None:
            keys = keys.masked_fill(padding[:, None], 0.0)
            grad_keys = grad_keys.masked_fill(padding[:, None], 0.0)
        grad_k[at_key] = features_backward(keys, phi_k, grad_keys, linear.feature_map).to(k.dtype)
        grad_v[at_key] = grad_values.to(v.dtype)
    return in_query_order(grad_q, plan), grad_k, grad_v


def _k_padding(plan: SparsePlan, batch: int) -> Tensor | None:
    if plan.kv_lengths is None and plan.k_block_sizes is None:
        return None
    sizes = plan.k_sizes()
    token = torch.arange(plan.kv_len, device=plan.device)
    return token % plan.block_k >= sizes[batch if len(sizes) > 1 else 0, token // plan.block_k]
