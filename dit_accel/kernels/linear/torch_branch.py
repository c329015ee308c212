"""The linear branch in plain torch, in state space: which blocks a row sums is a matrix product.

Per key block H_j = phi(K_j)^T V_j and Z_j = sum phi(K_j); with W the 0/1 matrix of a row's linear set,
H_i = sum_j W_ij H_j, so nothing is subtracted that would have to cancel. A few heads at a time, so that the
states never take more than `STATE_BYTES`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.linear.features import features, features_backward
from dit_accel.kernels.linear.spec import Linear
from dit_accel.kernels.plan import SparsePlan
from dit_accel.kernels.precision import wide
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
    dtype = wide(q)
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
    dtype = wide(q)
    q = in_block_order(q, plan)
    o_l = q.new_empty(*q.shape[:-1], v.shape[-1])
    norm = q.new_empty(q.shape[:-1], dtype=dtype)
    scratch = _Scratch()
    for head in _heads(q, k, v, plan, linear):
        at = (head.batch, head.heads)
        totals = None
        if linear.state is not None:
            kv, z = (x[head.batch, head.kv_head].to(dtype) for x in linear.state)
            totals = _State(kv, z)
        for _, rows, state in _row_states(head, plan, totals, scratch):
            phi = head.phi_q[:, rows]
            total = _totals(phi, state.z, plan)
            if linear.scope == "all":
                total = total + 1e-5
            valid = total > 0
            inverse = torch.where(valid, 1 / torch.where(valid, total, 1.0), 0.0)
            norm[at][:, rows] = inverse
            phi.mul_(inverse[..., None])
            o_l[at][:, rows] = _times(phi, state.kv, plan)
        invalid = _q_invalid(plan)
        if invalid is not None:
            norm[at] = norm[at].masked_fill(invalid, 0.0)
    return in_query_order(o_l, plan), in_query_order(norm, plan)


class _State(NamedTuple):
    kv: Tensor
    """`[D, Dv]`, or per block `[..., D, Dv]`."""
    z: Tensor
    """`[D]`, or per block `[..., D]`."""


class _Scratch:
    """Memory that every head uses again: touching new pages costs as much as the products."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Unwritten, of this shape, and of the dtype and device of `like`."""
        n = math.prod(shape)
        if name not in self._kept or self._kept[name].numel() < n:
            self._kept[name] = like.new_empty(n)
        return self._kept[name][:n].view(shape)


def _totals(rows: Tensor, z: Tensor, plan: SparsePlan) -> Tensor:
    """Rows `[G, n, D]` of whole query blocks times one `[D]`, or one per block `[G, n_q, D]`: `[G, n]`."""
    if z.ndim == 1:
        return rows @ z
    return torch.linalg.vecdot(_blocks(rows, plan), z[..., None, :]).flatten(1)[:, : rows.shape[1]]


def _times(rows: Tensor, state: Tensor, plan: SparsePlan) -> Tensor:
    """Rows `[G, n, D]` of whole query blocks times one state `[D, N]`, or one per block `[G, n_q, D, N]`."""
    if state.ndim == 2:
        return rows @ state
    return (_blocks(rows, plan) @ state).flatten(1, 2)[:, : rows.shape[1]]


def _row_states(
    head: _Head, plan: SparsePlan, totals: _State | None, scratch: _Scratch
) -> Iterator[tuple[slice, slice, _State]]:
    """Query blocks, their rows, and their sums over keys: one state for all, or `[G, n, ...]`.

    A state is valid until the next one is asked for.
    """
    phi, v = head.phi_k, head.v
    if head.weights is None:
        if totals is None:
            phi, v = phi.flatten(0, 1), v.flatten(0, 1)
            totals = _State(phi.T @ v, phi.sum(0))
        yield slice(0, plan.num_q_blocks), slice(0, plan.q_len), totals
        return
    shape = len(phi), phi.shape[-1], v.shape[-1]
    per_block = torch.bmm(phi.mT, v, out=scratch.take("blocks", phi, *shape)).flatten(1)
    z_per_block = phi.sum(1)
    for blocks, rows in _row_chunks(head, plan):
        weights = head.weights[:, blocks]
        kv = scratch.take("rows", phi, weights.shape[0] * weights.shape[1], per_block.shape[1])
        torch.mm(weights.flatten(0, 1), per_block, out=kv)
        kv, z = kv.view(*weights.shape[:2], *shape[1:]), weights @ z_per_block
        if totals is not None:
            kv, z = torch.sub(totals.kv, kv, out=kv), totals.z - z
        yield blocks, rows, _State(kv, z)


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
    scratch = _Scratch()
    for head in _heads(q, k, v, plan, linear):
        at = (head.batch, head.heads)
        g, n = grad_o_l[at].to(dtype), norm[at]
        if q_invalid is not None:
            g = g.masked_fill(q_invalid[:, None], 0.0)
        # A row's gradients of numerator and denominator.
        grad_sums = g * n[..., None]
        grad_total = -(grad_sums * o_l[at].to(dtype)).sum(-1, keepdim=True)
        grad_phi_q = torch.empty_like(head.phi_q)
        grads: _State | None = None
        for blocks, rows, state in _row_states(head, plan, None, scratch):
            gs, gt = grad_sums[:, rows], grad_total[:, rows]
            torch.add(
                _times(gs, state.kv.mT, plan),
                _times(gt, state.z[..., None, :], plan),
                out=grad_phi_q[:, rows],
            )
            part = _key_sums(head, blocks, head.phi_q[:, rows], gs, gt, plan)
            grads = part if grads is None else _State(grads.kv + part.kv, grads.z + part.z)
        assert grads is not None
        grad_phi_k = (head.v @ grads.kv.mT).add_(grads.z[..., None, :])
        grad_values = head.phi_k @ grads.kv
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


def _key_sums(
    head: _Head, blocks: slice, phi: Tensor, grad_sums: Tensor, grad_total: Tensor, plan: SparsePlan
) -> _State:
    """What rows pass on to the keys: one state for all key blocks, or one per block `[T_k, ...]`."""
    if head.weights is None:
        return _State((phi.mT @ grad_sums).sum(0), (phi.mT @ grad_total).sum(0)[:, 0])
    weights = head.weights[:, blocks].flatten(0, 1).T
    phi = _blocks(phi, plan).mT
    kv, z = (
        (phi @ _blocks(x, plan)).flatten(0, 1) for x in (grad_sums, grad_total)
    )  # [G * n, D, N]
    return _State((weights @ kv.flatten(1)).unflatten(-1, kv.shape[1:]), weights @ z[..., 0])


def _k_padding(plan: SparsePlan, batch: int) -> Tensor | None:
    if plan.kv_lengths is None and plan.k_block_sizes is None:
        return None
    sizes = plan.k_sizes()
    token = torch.arange(plan.kv_len, device=plan.device)
    return token % plan.block_k >= sizes[batch if len(sizes) > 1 else 0, token // plan.block_k]
