"""The torch backend: gather the chosen key blocks of a few query blocks, two bmm, next.

Works on any device and covers every plan; memory stays near inputs + outputs because only one
chunk of gathered keys, values and scores exists at a time. Backward recomputes the weights from
`lse`, so nothing of size [Lq, Lk] is ever saved. Half types are computed in fp32.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.kernels.plan import SparsePlan, _to_lists
from dit_accel.kernels.router import pool_blocks

# Scores of one chunk: half a MiB in fp32 stays in a core's cache; larger chunks measured slower.
CHUNK_SCORES = 2**17
# Keys and values that must be copied (padding, strides, upcast) are copied this much at a time.
STAGE_BYTES = 2**24


@dataclass
class _Chunk:
    """Some query blocks of one stage, with equally many (padded) key blocks each."""

    rows: Tensor | slice
    """Places in the stage's blocked query tensor."""
    kv_rows: Tensor
    """`[c * n]` places in the stage's blocked key tensor."""
    kv_heads: Tensor
    """`[c]` key head within the stage."""
    hidden: Tensor | None
    """`[c, 1 or BQ, n * BK]`, True where a key must not be read; None: nothing is hidden."""
    tail_bias: Tensor | None
    """`[c, 1 or BQ, T_k]`, log(block size) of unread blocks and -inf of read ones."""


class _Layout:
    """The plan, unpacked for gathering: per-row block lists and what has to be masked."""

    def __init__(self, plan: SparsePlan, shared_softmax: bool, dtype: torch.dtype) -> None:
        self.plan = plan
        blocks = plan.to_block_mask()
        self.counts, indices = _to_lists(blocks)
        self.indices = indices.long()
        self.k_sizes = plan.k_sizes()
        masked = plan.kv_num_blocks > 0
        if plan.q_block_sizes is not None:
            masked = masked | (plan.q_sizes() < plan.block_q)
        self.masked = masked
        self.q_padded = plan.q_block_sizes is not None
        self.k_padded = plan.kv_lengths is not None or plan.k_block_sizes is not None
        # Otherwise every key block holds a key, so a row with a tail is never empty.
        self.empty_tail = self.q_padded or self.k_padded
        self.unread_bias = None
        if shared_softmax:
            bias = self.k_sizes.to(dtype).log()[:, None, None, :]
            self.unread_bias = bias.masked_fill(blocks, -math.inf)

    def blocked_q(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Query heads of one stage in blocks, see `_blocked`."""
        plan = self.plan
        sizes = plan.q_sizes() if self.q_padded else None
        return _blocked(x, plan.num_q_blocks, plan.block_q, dtype, sizes)

    def blocked_k(self, x: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
        """Key heads of one stage in blocks, see `_blocked`."""
        plan = self.plan
        sizes = self.k_sizes[batch if len(self.k_sizes) > 1 else 0] if self.k_padded else None
        return _blocked(x, plan.num_k_blocks, plan.block_k, dtype, sizes)

    def chunks(self, batch: int, heads: slice, group: int) -> Iterator[_Chunk]:
        """The chunks of one stage: query heads `heads` of batch entry `batch`."""
        plan = self.plan
        n_heads, n_q, n_k = heads.stop - heads.start, plan.num_q_blocks, plan.num_k_blocks

        def of_stage(x: Tensor) -> Tensor:
            x = x[batch if x.shape[0] > 1 else 0]
            x = x[heads] if x.shape[0] > 1 else x.expand(n_heads, *x.shape[1:])
            return x.reshape(n_heads * n_q, *x.shape[2:])

        counts, indices, masked = map(of_stage, (self.counts, self.indices, self.masked))
        k_sizes = self.k_sizes[batch if len(self.k_sizes) > 1 else 0]
        unread = None if self.unread_bias is None else of_stage(self.unread_bias)
        kv_heads = torch.arange(n_heads, device=counts.device).div(group, rounding_mode="floor")
        kv_heads = kv_heads.repeat_interleave(n_q)
        # Rows of like cost share a chunk: unmasked ones first, then by falling block count.
        key = counts.long() + (~masked).long() * (n_k + 1)
        order = torch.argsort(key, descending=True, stable=True)
        in_order = bool((order[1:] > order[:-1]).all())
        sorted_counts, sorted_masked = counts[order].tolist(), masked[order].tolist()
        kinds = [(m, count > 0) for m, count in zip(sorted_masked, sorted_counts, strict=True)]
        tail = n_k if unread is not None else 0
        start = 0
        while start < len(order):
            n = sorted_counts[start]
            per_row = plan.block_q * max(n * plan.block_k + tail, 1)
            stop = min(start + max(1, CHUNK_SCORES // per_row), len(order))
            while kinds[stop - 1] != kinds[start]:
                stop -= 1
            at = order[start:stop]
            blocks = indices[at, :n]
            hidden = bias = None
            mixed = sorted_counts[stop - 1] != n
            if mixed:
                # Shorter lists repeat a block of their own: a weight of 0 would not hide a NaN of others.
                listed = torch.arange(n, device=at.device) < counts[at, None]
                blocks = torch.where(listed, blocks, blocks[:, :1])
            if sorted_masked[start] or mixed:
                hidden = ~self._visible(at % n_q, blocks, counts[at], k_sizes)
            if unread is not None:
                bias = unread[at][:, None, :]
                if plan.q_block_sizes is not None:
                    bias = bias.masked_fill(~self._q_valid(at % n_q)[..., None], -math.inf)
            yield _Chunk(
                rows=slice(start, stop) if in_order else at,
                kv_rows=(blocks + kv_heads[at, None] * n_k).flatten(),
                kv_heads=kv_heads[at],
                hidden=hidden,
                tail_bias=bias,
            )
            start = stop

    def _visible(self, q_block: Tensor, blocks: Tensor, counts: Tensor, k_sizes: Tensor) -> Tensor:
        plan, device = self.plan, blocks.device
        token = torch.arange(plan.block_k, device=device)
        listed = torch.arange(blocks.shape[1], device=device) < counts[:, None]
        visible = ((token < k_sizes[blocks][..., None]) & listed[..., None]).flatten(1)[:, None]
        if plan.positional:
            q_pos = q_block[:, None] * plan.block_q + torch.arange(plan.block_q, device=device)
            k_pos = (blocks[..., None] * plan.block_k + token).flatten(1)
            visible = visible & plan.visible(q_pos[..., None], k_pos[:, None])
        if plan.q_block_sizes is not None:
            visible = visible & self._q_valid(q_block)[..., None]
        return visible

    def _q_valid(self, q_block: Tensor) -> Tensor:
        token = torch.arange(self.plan.block_q, device=q_block.device)
        return token < self.plan.q_sizes()[q_block][:, None]


def _blocked(
    x: Tensor, n: int, block: int, dtype: torch.dtype, sizes: Tensor | None = None
) -> Tensor:
    """`[H, L, D]` as `[H * n, block, D]` in `dtype`, zero-padded; a view where that is possible.

    `sizes` `[n]` are the valid tokens of each block: what padding holds may be NaN, which a weight
    of zero would not cancel.
    """
    heads, length, d = x.shape
    if length != n * block:
        padded = x.new_zeros(heads, n * block, d, dtype=dtype)
        padded[:, :length] = x
        x = padded
    x = x.to(dtype).reshape(heads, n, block, d)
    if sizes is not None:
        padding = torch.arange(block, device=x.device) >= sizes[:, None]
        x = x.masked_fill(padding[..., None], 0.0)
    return x.flatten(0, 1)


def _unblocked(x: Tensor, heads: int, length: int) -> Tensor:
    return x.reshape(heads, -1, x.shape[-1])[:, :length]


def _stages(
    q: Tensor, k: Tensor, plan: SparsePlan, dtype: torch.dtype
) -> Iterator[tuple[int, slice, slice]]:
    """`(batch, query heads, key heads)`, few enough heads at a time where they must be copied."""
    kv_heads = k.shape[1]
    group = q.shape[1] // kv_heads
    per_head = plan.num_k_blocks * plan.block_k * (2 + 2 * group) * k.shape[-1] * dtype.itemsize
    is_view = k.is_contiguous() and k.dtype == dtype and plan.kv_len % plan.block_k == 0
    is_view = is_view and q.is_contiguous() and plan.q_len % plan.block_q == 0
    padding = (plan.q_block_sizes, plan.k_block_sizes, plan.kv_lengths)
    is_view = is_view and all(sizes is None for sizes in padding)
    step = kv_heads if is_view else max(1, min(kv_heads, STAGE_BYTES // per_head))
    for b in range(q.shape[0]):
        for h in range(0, kv_heads, step):
            end = min(h + step, kv_heads)
            yield b, slice(h * group, end * group), slice(h, end)


def _weights(
    chunk: _Chunk, q: Tensor, k: Tensor, centroids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores of a chunk and the keys they belong to; `q` comes scaled."""
    keys = k.index_select(0, chunk.kv_rows).view(q.shape[0], -1, k.shape[-1])
    exact = keys.shape[1]
    if centroids is not None:
        keys = torch.cat([keys, centroids.index_select(0, chunk.kv_heads)], 1)
    scores = torch.bmm(q, keys.mT)
    if chunk.hidden is not None:
        scores[..., :exact].masked_fill_(chunk.hidden, -math.inf)
    if chunk.tail_bias is not None:
        scores[..., exact:] += chunk.tail_bias
    return scores, keys


def _values(chunk: _Chunk, v: Tensor, centroids: Tensor | None) -> Tensor:
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
        layout = _Layout(plan, shared_softmax, dtype)
        for b, heads, kv_heads in _stages(q, k, plan, dtype):
            qb = layout.blocked_q(q[b, heads], dtype)
            kb = layout.blocked_k(k[b, kv_heads], b, dtype)
            vb = layout.blocked_k(v[b, kv_heads], b, dtype)
            centroid_k = centroid_v = None
            if shared_softmax:
                sizes = layout.k_sizes[b if len(layout.k_sizes) > 1 else 0][None]
                centroid_k = pool_blocks(k[b, kv_heads][None], plan.block_k, sizes)[0]
                centroid_v = pool_blocks(v[b, kv_heads][None], plan.block_k, sizes)[0]
            direct = o.dtype == dtype and plan.q_len % plan.block_q == 0
            ob = (
                o[b, heads].view(*qb.shape[:2], -1)
                if direct
                else qb.new_empty(*qb.shape[:2], v.shape[-1])
            )
            lb = qb.new_empty(qb.shape[:2]) if want_lse else None
            for chunk in layout.chunks(b, heads, group):
                scores, _ = _weights(chunk, qb[chunk.rows] * scale, kb, centroid_k)
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
                ob[chunk.rows] = torch.bmm(p, _values(chunk, vb, centroid_v))
            n_heads = heads.stop - heads.start
            if not direct:
                o[b, heads] = _unblocked(ob, n_heads, plan.q_len).to(o.dtype)
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
        layout = _Layout(plan, ctx.shared_softmax, dtype)
        for b, heads, kv_heads in _stages(q, k, plan, dtype):
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
            centroid_k = centroid_v = None
            if ctx.shared_softmax:
                sizes = layout.k_sizes[b if len(layout.k_sizes) > 1 else 0]
                centroid_k = pool_blocks(k[b, kv_heads][None], plan.block_k, sizes[None])[0]
                centroid_v = pool_blocks(v[b, kv_heads][None], plan.block_k, sizes[None])[0]
                gck, gcv = torch.zeros_like(centroid_k), torch.zeros_like(centroid_v)
            for chunk in layout.chunks(b, heads, group):
                qc, goc = qb[chunk.rows], go[chunk.rows]
                scores, keys = _weights(chunk, qc * scale, kb, centroid_k)
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
                token = torch.arange(plan.block_k, device=q.device)
                share = (token < sizes[:, None]).to(dtype) / sizes.clamp(min=1)[:, None]
                share = share.repeat(n_kv, 1)[..., None]
                gk += share * gck.flatten(0, 1)[:, None]
                gv += share * gcv.flatten(0, 1)[:, None]
            grad_q[b, heads] = _unblocked(gq, n_heads, plan.q_len).to(q.dtype)
            grad_k[b, kv_heads] = _unblocked(gk, n_kv, plan.kv_len).to(k.dtype)
            grad_v[b, kv_heads] = _unblocked(gv, n_kv, plan.kv_len).to(v.dtype)
        return grad_q, grad_k, grad_v, None, None, None, None
