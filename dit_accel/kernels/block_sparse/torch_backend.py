"""Torch backend: gathers the key blocks of a few query blocks at a time, and multiplies them with two bmm.

It supports every device and every plan. Memory stays near that of inputs and outputs, because only one chunk of gathered
keys, values and scores exists at a time. The backward pass recomputes the weights from `lse`, so nothing of size [Lq, Lk]
is saved. Half types are computed in fp32. The linear branch is computed separately, in state space
(`linear/torch_branch.py`).
"""

import math

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.chunks import Chunk, Layout, stages, unblocked
from dit_accel.kernels.linear import torch_branch, torch_gradients
from dit_accel.kernels.linear.mix import Mix
from dit_accel.kernels.linear.spec import Linear
from dit_accel.kernels.plan import SparsePlan
from dit_accel.kernels.precision import wide
from dit_accel.kernels.row_order import in_block_order, in_query_order


def _scores(
    chunk: Chunk, q: Tensor, scale: float, k: Tensor, stack: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the scores of a chunk and its gathered keys."""
    keys = _gathered(chunk, k, len(q))
    # With beta=0 the first argument is not read. alpha scales at no cost.
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, keys.mT, beta=0, alpha=scale)
    # Stacked heads have the same mask. The rows of the heads follow each other.
    by_head = scores if stack == 1 else scores.unflatten(1, (stack, -1))
    if chunk.hidden is not None:
        hidden = chunk.hidden if stack == 1 else chunk.hidden[:, None]
        by_head[..., chunk.free : chunk.exact].masked_fill_(hidden, -math.inf)
    if chunk.tail_bias is not None:
        by_head[..., chunk.exact :] += chunk.tail_bias if stack == 1 else chunk.tail_bias[:, None]
    return scores, keys


def _gathered(chunk: Chunk, table: Tensor, count: int) -> Tensor:
    """Return the keys or values that the chunk reads, `[c, n, D]`."""
    return table.index_select(0, chunk.kv_rows).view(count, -1, table.shape[-1])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    *,
    scale: float,
    shared_softmax: bool,
    linear: Linear | None,
    want_lse: bool,
    mix: Mix | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `o, lse, o_l, norm`.

    `lse` is empty without `want_lse`; `o_l` and `norm` are empty without a linear branch. With `mix`, `o` is the mixed
    result, and `o_l` and `norm` are empty.
    """
    rows = in_block_order(q, plan)
    o, lse = _forward(rows, k, v, plan, scale, shared_softmax, want_lse)
    o_l, norm = q.new_empty(0), q.new_empty(0, dtype=lse.dtype)
    if linear is not None and mix is not None:
        torch_branch.mix_(o, rows, k, v, plan, linear, mix)
    elif linear is not None:
        o_l, norm = torch_branch.forward(q, k, v, plan, linear)
    if want_lse:
        lse = in_query_order(lse, plan)
    return in_query_order(o, plan), lse, o_l, norm


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    rows = [in_block_order(x, plan) for x in (q, grad_o, o, lse)]
    delta = (rows[1].to(lse.dtype) * rows[2].to(lse.dtype)).sum(-1)
    if grad_lse is not None:
        delta -= in_block_order(grad_lse, plan)
    grads = _backward(rows[0], k, v, rows[1], rows[3], delta, plan, scale, shared_softmax)
    if linear is not None and grad_o_l is not None:
        g, rows_l, norm = (in_block_order(x, plan) for x in (grad_o_l, o_l, norm))
        torch_gradients.add_gradients_(grads, g, rows[0], k, v, plan, rows_l, norm, linear)
    return (in_query_order(grads[0], plan), *grads[1:])


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    scale: float,
    shared_softmax: bool,
    want_lse: bool,
) -> tuple[Tensor, Tensor]:
    dtype = wide(q)
    group = q.shape[1] // k.shape[1]
    o = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[:-1] if want_lse else (0,), dtype=dtype)
    layout = Layout(plan, shared_softmax, dtype)
    # Query heads of a group that share their lists are stacked, so that their keys are gathered once.
    stack = group if not shared_softmax and plan.heads in (1, k.shape[1]) else 1
    for b, heads, kv_heads in stages(q, k, layout, dtype):
        listed = heads if stack == 1 else kv_heads
        qb = layout.blocked_q(q[b, heads], dtype)
        if stack > 1:
            qb = _stacked(qb, stack, plan.num_q_blocks)
        kb = layout.table(k[b, kv_heads], b, listed, dtype)
        vb = layout.table(v[b, kv_heads], b, listed, dtype)
        direct = o.dtype == dtype and plan.q_len % plan.block_q == 0 and stack == 1
        ob = (
            o[b, heads].view(*qb.shape[:2], -1)
            if direct
            else qb.new_empty(*qb.shape[:2], v.shape[-1])
        )
        lb = qb.new_empty(qb.shape[:2]) if want_lse else None
        for chunk in layout.chunks(b, listed, group // stack, stack):
            scores, _ = _scores(chunk, qb[chunk.rows], scale, kb, stack)
            if scores.shape[-1] == 0:  # rows that read nothing
                ob[chunk.rows] = 0
                if lb is not None:
                    lb[chunk.rows] = -math.inf
                continue
            may_be_empty = chunk.free == 0 and (
                chunk.hidden is not None or (layout.has_tail and layout.empty_tail)
            )
            p = torch.softmax(scores, -1)
            if want_lse or may_be_empty:
                top = scores.amax(-1)
            if may_be_empty:
                p.masked_fill_((top == -math.inf)[..., None], 0.0)
            if lb is not None:
                # The largest weight is exp(top - lse), so lse needs no second exponential.
                lb[chunk.rows] = torch.where(top == -math.inf, top, top - p.amax(-1).log())
            values = _gathered(chunk, vb, len(p))
            if isinstance(chunk.rows, slice):
                torch.bmm(p, values, out=ob[chunk.rows])
            else:
                ob[chunk.rows] = torch.bmm(p, values)
        n_heads = heads.stop - heads.start
        if stack > 1:
            ob = _unstacked(ob, stack, plan.num_q_blocks)
            lb = None if lb is None else _unstacked(lb[..., None], stack, plan.num_q_blocks)
        if not direct:
            o[b, heads] = unblocked(ob, n_heads, plan.q_len).to(o.dtype)
        if lb is not None:
            lse[b, heads] = lb.view(n_heads, -1)[:, : plan.q_len]
    return o, lse


def _stacked(x: Tensor, heads: int, blocks: int) -> Tensor:
    """Return blocks `[Hkv * heads * T, B, D]` of all query heads as `[Hkv * T, heads * B, D]`."""
    return x.unflatten(0, (-1, heads, blocks)).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def _unstacked(x: Tensor, heads: int, blocks: int) -> Tensor:
    """Return the inverse of `_stacked`."""
    rows = x.unflatten(0, (-1, blocks)).unflatten(2, (heads, -1))
    return rows.transpose(1, 2).flatten(0, 2)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_o: Tensor,
    lse: Tensor,
    delta: Tensor,
    plan: SparsePlan,
    scale: float,
    shared_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = lse.dtype
    group = q.shape[1] // k.shape[1]
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    layout = Layout(plan, shared_softmax, dtype)
    for b, heads, kv_heads in stages(q, k, layout, dtype):
        n_heads, n_kv = heads.stop - heads.start, kv_heads.stop - kv_heads.start
        qb = layout.blocked_q(q[b, heads], dtype)
        kb = layout.table(k[b, kv_heads], b, heads, dtype)
        vb = layout.table(v[b, kv_heads], b, heads, dtype)
        go = layout.blocked_q(grad_o[b, heads], dtype)
        lb = layout.blocked_q(lse[b, heads][..., None], dtype)
        lb = lb.masked_fill(lb == -math.inf, 0.0)  # hidden scores are -inf, so their weights are 0
        db = layout.blocked_q(delta[b, heads][..., None], dtype)
        gq, gk, gv = (
            x.new_zeros(x.shape) for x in (qb, kb, vb)
        )  # contiguous, unlike zeros_like for a strided x
        for chunk in layout.chunks(b, heads, group):
            qc, goc = qb[chunk.rows], go[chunk.rows]
            scores, keys = _scores(chunk, qc, scale, kb)
            if scores.shape[-1] == 0:
                continue
            p = scores.sub_(lb[chunk.rows]).exp_()
            dv = torch.bmm(p.mT, goc)
            ds = torch.bmm(goc, _gathered(chunk, vb, len(qc)).mT)
            ds = ds.sub_(db[chunk.rows]).mul_(p).mul_(scale)
            gq[chunk.rows] = torch.bmm(ds, keys)
            dk = torch.bmm(ds.mT, qc)
            gk.index_add_(0, chunk.kv_rows, dk.reshape(-1, *kb.shape[1:]))
            gv.index_add_(0, chunk.kv_rows, dv.reshape(-1, *vb.shape[1:]))
        if layout.has_tail:
            gtk, gtv = layout.tail_of(gk, n_kv), layout.tail_of(gv, n_kv)
            gk, gv = (x[: n_kv * plan.num_k_blocks] for x in (gk, gv))
        if shared_softmax:
            # A mean passes its gradient to its tokens in equal parts.
            sizes = layout.sizes_of(b)
            token = torch.arange(plan.block_k, device=q.device)
            share = (token < sizes[:, None]).to(dtype) / sizes.clamp(min=1)[:, None]
            share = share.repeat(n_kv, 1)[..., None]
            gk += share * gtk.flatten(0, 1)[:, None]
            gv += share * gtv.flatten(0, 1)[:, None]
        elif layout.columns is not None:
            columns, _ = layout.columns_of(b, heads)
            head = torch.arange(n_heads, device=q.device) // group
            token = (columns + head[:, None] * plan.num_k_blocks * plan.block_k).flatten()
            gk.view(-1, gk.shape[-1]).index_add_(0, token, gtk.flatten(0, 1))
            gv.view(-1, gv.shape[-1]).index_add_(0, token, gtv.flatten(0, 1))
        grad_q[b, heads] = unblocked(gq, n_heads, plan.q_len).to(q.dtype)
        grad_k[b, kv_heads] = unblocked(gk, n_kv, plan.kv_len).to(k.dtype)
        grad_v[b, kv_heads] = unblocked(gv, n_kv, plan.kv_len).to(v.dtype)
    return grad_q, grad_k, grad_v
