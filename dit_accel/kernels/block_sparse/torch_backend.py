"""The torch backend: gather the chosen key blocks of a few query blocks, two bmm, next.

Works on any device and covers every plan; memory stays near inputs + outputs because only one
chunk of gathered keys, values and scores exists at a time. Backward recomputes the weights from
`lse`, so nothing of size [Lq, Lk] is ever saved. Half types are computed in fp32.
"""

import math

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.chunks import Chunk, Layout, stages, unblocked


def _scores(
    chunk: Chunk, q: Tensor, scale: float, k: Tensor, centroids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores of a chunk and the keys they belong to."""
    keys = k.index_select(0, chunk.kv_rows).view(q.shape[0], -1, k.shape[-1])
    exact = keys.shape[1]
    if centroids is not None:
        keys = torch.cat([keys, centroids.index_select(0, chunk.kv_heads)], 1)
    # With beta=0 the first argument is never read; alpha scales for free.
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, keys.mT, beta=0, alpha=scale)
    if chunk.hidden is not None:
        scores[..., :exact].masked_fill_(chunk.hidden, -math.inf)
    if chunk.tail_bias is not None:
        scores[..., exact:] += chunk.tail_bias
    return scores, keys


def _values(chunk: Chunk, v: Tensor, centroids: Tensor | None) -> Tensor:
    values = v.index_select(0, chunk.kv_rows).view(len(chunk.kv_heads), -1, v.shape[-1])
    if centroids is not None:
        values = torch.cat([values, centroids.index_select(0, chunk.kv_heads)], 1)
    return values


class BlockSparse(torch.autograd.Function):
    """`o, lse = f(q, k, v)`; equations 1 and 2 forward, 3 backward (README.md)."""

    @staticmethod
    def forward(ctx, q, k, v, plan, scale, shared_softmax, want_lse):
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        group = q.shape[1] // k.shape[1]
        want_lse = want_lse or any(ctx.needs_input_grad)
        o = q.new_empty(*q.shape[:-1], v.shape[-1])
        lse = q.new_empty(q.shape[:-1] if want_lse else (0,), dtype=dtype)
        layout = Layout(plan, shared_softmax, dtype)
        for b, heads, kv_heads in stages(q, k, plan, dtype):
            qb = layout.blocked_q(q[b, heads], dtype)
            kb = layout.blocked_k(k[b, kv_heads], b, dtype)
            vb = layout.blocked_k(v[b, kv_heads], b, dtype)
            centroid_k = layout.centroids(k[b, kv_heads], b)
            centroid_v = layout.centroids(v[b, kv_heads], b)
            direct = o.dtype == dtype and plan.q_len % plan.block_q == 0
            ob = (
                o[b, heads].view(*qb.shape[:2], -1)
                if direct
                else qb.new_empty(*qb.shape[:2], v.shape[-1])
            )
            lb = qb.new_empty(qb.shape[:2]) if want_lse else None
            for chunk in layout.chunks(b, heads, group):
                scores, _ = _scores(chunk, qb[chunk.rows], scale, kb, centroid_k)
                if scores.shape[-1] == 0:  # rows that read nothing
                    ob[chunk.rows] = 0
                    if lb is not None:
                        lb[chunk.rows] = -math.inf
                    continue
                may_be_empty = chunk.hidden is not None or (shared_softmax and layout.empty_tail)
                p = torch.softmax(scores, -1)
                if want_lse or may_be_empty:
                    top = scores.amax(-1)
                if may_be_empty:
                    p.masked_fill_((top == -math.inf)[..., None], 0.0)
                if lb is not None:
                    # The largest weight is exp(top - lse), so no second exponential is needed.
                    lb[chunk.rows] = torch.where(top == -math.inf, top, top - p.amax(-1).log())
                values = _values(chunk, vb, centroid_v)
                if isinstance(chunk.rows, slice):
                    torch.bmm(p, values, out=ob[chunk.rows])
                else:
                    ob[chunk.rows] = torch.bmm(p, values)
            n_heads = heads.stop - heads.start
            if not direct:
                o[b, heads] = unblocked(ob, n_heads, plan.q_len).to(o.dtype)
            if lb is not None:
                lse[b, heads] = lb.view(n_heads, -1)[:, : plan.q_len]
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.plan, ctx.scale, ctx.shared_softmax = plan, scale, shared_softmax
        return o, lse

    @staticmethod
    def backward(ctx, grad_o, grad_lse):
        q, k, v, o, lse = ctx.saved_tensors
        plan, scale = ctx.plan, ctx.scale
        dtype = lse.dtype
        group = q.shape[1] // k.shape[1]
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        layout = Layout(plan, ctx.shared_softmax, dtype)
        for b, heads, kv_heads in stages(q, k, plan, dtype):
            n_heads, n_kv = heads.stop - heads.start, kv_heads.stop - kv_heads.start
            qb = layout.blocked_q(q[b, heads], dtype)
            kb = layout.blocked_k(k[b, kv_heads], b, dtype)
            vb = layout.blocked_k(v[b, kv_heads], b, dtype)
            go = layout.blocked_q(grad_o[b, heads], dtype)
            lb = layout.blocked_q(lse[b, heads][..., None], dtype)
            lb = lb.masked_fill(lb == -math.inf, 0.0)  # hidden scores are -inf, so weights stay 0
            delta = (grad_o[b, heads].to(dtype) * o[b, heads].to(dtype)).sum(-1) - grad_lse[
                b, heads
            ]
            db = layout.blocked_q(delta[..., None], dtype)
            gq = torch.zeros_like(qb)
            gk, gv = torch.zeros_like(kb), torch.zeros_like(vb)
            centroid_k = layout.centroids(k[b, kv_heads], b)
            centroid_v = layout.centroids(v[b, kv_heads], b)
            if centroid_k is not None and centroid_v is not None:
                gck, gcv = torch.zeros_like(centroid_k), torch.zeros_like(centroid_v)
            for chunk in layout.chunks(b, heads, group):
                qc, goc = qb[chunk.rows], go[chunk.rows]
                scores, keys = _scores(chunk, qc, scale, kb, centroid_k)
                if scores.shape[-1] == 0:
                    continue
                p = scores.sub_(lb[chunk.rows]).exp_()
                dv = torch.bmm(p.mT, goc)
                ds = torch.bmm(goc, _values(chunk, vb, centroid_v).mT)
                ds = ds.sub_(db[chunk.rows]).mul_(p).mul_(scale)
                gq[chunk.rows] = torch.bmm(ds, keys)
                dk = torch.bmm(ds.mT, qc)
                exact = len(chunk.kv_rows) // len(chunk.kv_heads) * plan.block_k
                gk.index_add_(0, chunk.kv_rows, dk[:, :exact].reshape(-1, *kb.shape[1:]))
                gv.index_add_(0, chunk.kv_rows, dv[:, :exact].reshape(-1, *vb.shape[1:]))
                if ctx.shared_softmax:
                    gck.index_add_(0, chunk.kv_heads, dk[:, exact:])
                    gcv.index_add_(0, chunk.kv_heads, dv[:, exact:])
            if ctx.shared_softmax:
                # A mean hands its gradient to its tokens in equal parts.
                sizes = layout.sizes_of(b)
                token = torch.arange(plan.block_k, device=q.device)
                share = (token < sizes[:, None]).to(dtype) / sizes.clamp(min=1)[:, None]
                share = share.repeat(n_kv, 1)[..., None]
                gk += share * gck.flatten(0, 1)[:, None]
                gv += share * gcv.flatten(0, 1)[:, None]
            grad_q[b, heads] = unblocked(gq, n_heads, plan.q_len).to(q.dtype)
            grad_k[b, kv_heads] = unblocked(gk, n_kv, plan.kv_len).to(k.dtype)
            grad_v[b, kv_heads] = unblocked(gv, n_kv, plan.kv_len).to(v.dtype)
        return grad_q, grad_k, grad_v, None, None, None, None
