"""Order of work of the torch backend: stages of heads, and chunks of query blocks with similar numbers of key blocks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.kernels.plan import SparsePlan
from dit_accel.kernels.router import pool_blocks
from dit_accel.kernels.visibility import row_ends

# Number of scores of one chunk per thread: half a MiB in fp32 stays in a core's cache. Larger chunks were slower.
CHUNK_SCORES = 2**17
# Factor of the chunk size with several threads. Each operation wakes the threads, which costs more than the cache saves,
# especially in the backward pass.
THREADED = 4
# Number of elements of keys and values that are copied at a time (for padding, strides or another dtype).
STAGE_BYTES = 2**24


@dataclass
class Chunk:
    """Query blocks of one stage that have the same number of key blocks after padding."""

    rows: Tensor | slice
    """Indices in the stage's blocked query tensor."""
    kv_rows: Tensor
    """Indices `[c * n]` in the stage's table of keys or values. Those of the tail are last."""
    free: int
    """Number of keys in blocks that every row of the chunk reads whole. They come first."""
    exact: int
    """Number of keys of listed blocks. Those of the tail follow."""
    hidden: Tensor | None
    """Mask `[c, 1 or BQ, exact - free]`, True where a key must not be read. None: no key is hidden."""
    tail_bias: Tensor | None
    """Bias `[c, 1 or BQ, n_tail]` of the scores of the tail: log(block size) for means of unread blocks, 0 for columns,
    -inf for keys that are on a list already or must not be read."""


class Layout:
    """A plan, unpacked for gathering: block lists of each row, and masks."""

    def __init__(self, plan: SparsePlan, shared_softmax: bool, dtype: torch.dtype) -> None:
        self.plan = plan
        self.whole, self.counts, self.indices = _lists(plan)
        self.k_sizes = plan.k_sizes()
        masked = plan.kv_num_blocks > 0
        if plan.q_block_sizes is not None:
            short = plan.q_sizes() < plan.block_q
            masked = masked | short
            self.whole = self.whole.masked_fill(short, 0)  # padding queries read nothing
        self.masked = masked
        self.q_padded = plan.q_block_sizes is not None
        self.k_padded = plan.kv_lengths is not None or plan.k_block_sizes is not None
        self.columns = None if plan.columns is None else plan.columns.long()
        self.has_tail = shared_softmax or self.columns is not None
        # Without padding, every key block has a key, so a row with block means always has a key.
        self.empty_tail = self.q_padded or self.k_padded or self.columns is not None
        self.blocks = plan.to_block_mask()
        self.q_pos = self._positions()
        self.unread_bias = None
        self.n_tail = 0 if self.columns is None else self.columns.shape[-1]
        if shared_softmax:
            self.n_tail = plan.num_k_blocks
            bias = self.k_sizes.to(dtype).log()[:, None, None, :]
            self.unread_bias = bias.masked_fill(self.blocks, -math.inf)
        self.tail_blocks = -(-self.n_tail // plan.block_k)

    def blocked_q(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the query heads of one stage in blocks; see `_blocked`."""
        plan = self.plan
        sizes = plan.q_sizes() if self.q_padded else None
        return _blocked(x, plan.num_q_blocks, plan.block_q, dtype, sizes)

    def table(self, x: Tensor, batch: int, heads: slice, dtype: torch.dtype) -> Tensor:
        """Return keys or values `[Hkv, Lk, D]` of one stage in blocks (see `_blocked`), followed by the tail.

        The tail is the block means `[Hkv, T_k, D]`, or the columns of each query head `[Hq, C, D]`. It is part of the
        same table, so that one gather reads listed blocks and tail. A separate gather and a concatenation took twice
        as long.
        """
        plan = self.plan
        sizes = self.sizes_of(batch) if self.k_padded else None
        if not self.has_tail:
            return _blocked(x, plan.num_k_blocks, plan.block_k, dtype, sizes)
        tail = self._tail(x, batch, heads, dtype)
        n, n_tail = len(x) * plan.num_k_blocks, -(-tail.shape[1] // plan.block_k)
        table = x.new_empty(n + len(tail) * n_tail, plan.block_k, x.shape[-1], dtype=dtype)
        _blocked(x, plan.num_k_blocks, plan.block_k, dtype, sizes, out=table[:n])
        _blocked(tail, n_tail, plan.block_k, dtype, out=table[n:])
        return table

    def tail_of(self, table: Tensor, kv_heads: int) -> Tensor:
        """Return the tail of a table, a view `[Hkv or Hq, n_tail, D]`."""
        plan = self.plan
        tail = table[kv_heads * plan.num_k_blocks :].unflatten(0, (-1, self.tail_blocks))
        return tail.flatten(1, 2)[:, : self.n_tail]

    def sizes_of(self, batch: int) -> Tensor:
        """Return the number of valid keys of each key block, `[T_k]`."""
        return self.k_sizes[batch if len(self.k_sizes) > 1 else 0]

    def _tail(self, x: Tensor, batch: int, heads: slice, dtype: torch.dtype) -> Tensor:
        if self.unread_bias is not None:
            return pool_blocks(x[None], self.plan.block_k, self.sizes_of(batch)[None])[0]
        columns, valid = self.columns_of(batch, heads)
        head = torch.arange(len(columns), device=x.device) * len(x) // len(columns)
        return x[head[:, None], columns].to(dtype).masked_fill(~valid[..., None], 0.0)

    def columns_of(self, batch: int, heads: slice) -> tuple[Tensor, Tensor]:
        """Return the columns of the stage's query heads, `[Hq, C]`, with valid indices in unused places, and their mask."""
        assert self.columns is not None
        plan = self.plan
        columns = self.columns[batch if len(self.columns) > 1 else 0]
        columns = (
            columns[heads] if len(columns) > 1 else columns.expand(heads.stop - heads.start, -1)
        )
        valid = columns < plan.kv_len
        columns = columns.clamp(max=plan.kv_len - 1)
        size = self.sizes_of(batch)[columns // plan.block_k]
        return columns, valid & (columns % plan.block_k < size)

    def _positions(self) -> Tensor:
        """Return the position of each row of the blocked queries, `[Hq|1, T_q * BQ]`; 0 for rows past the end."""
        plan = self.plan
        if plan.q_order is None:
            return torch.arange(plan.num_q_blocks * plan.block_q, device=plan.device)[None]
        pad = plan.num_q_blocks * plan.block_q - plan.q_len
        return torch.nn.functional.pad(plan.q_order.long(), (0, pad))

    def chunks(self, batch: int, heads: slice, group: int, stack: int = 1) -> Iterator[Chunk]:
        """Yield the chunks of one stage.

        Args:
            batch: batch entry.
            heads: query heads of the stage.
            group: number of query heads per head of keys.
            stack: number of query heads that share the lists and are computed together.
        """
        plan = self.plan
        n_heads, n_q, n_k = heads.stop - heads.start, plan.num_q_blocks, plan.num_k_blocks

        def of_stage(x: Tensor) -> Tensor:
            x = x[batch if x.shape[0] > 1 else 0]
            x = x[heads] if x.shape[0] > 1 else x.expand(n_heads, *x.shape[1:])
            return x.reshape(n_heads * n_q, *x.shape[2:])

        whole, counts, indices, masked = map(
            of_stage, (self.whole, self.counts, self.indices, self.masked)
        )
        k_sizes = self.sizes_of(batch)
        biases = None if self.unread_bias is None else of_stage(self.unread_bias)
        q_heads = torch.arange(n_heads, device=counts.device).repeat_interleave(n_q)
        kv_heads = q_heads.div(group, rounding_mode="floor")
        # Rows with similar costs share a chunk: rows without mask first, then by descending number of blocks.
        key = counts.long() + (~masked).long() * (n_k + 1)
        order = torch.argsort(key, descending=True, stable=True)
        in_order = bool((order[1:] > order[:-1]).all())
        # Sorted once here, so that most chunks are a few slices.
        whole, counts, indices, masked = (x[order] for x in (whole, counts, indices, masked))
        kv_heads, q_heads, q_blocks = kv_heads[order], q_heads[order], order % n_q
        kv_rows = indices + kv_heads[:, None] * n_k
        biases = None if biases is None else biases[order][:, None, :]
        tail_heads = kv_heads
        if self.columns is not None:
            tail_heads = q_heads
            at, shown = self._columns_shown(batch, heads, q_heads, of_stage(self.blocks)[order])
            like = self._rows_see_alike(q_blocks, q_heads + heads.start, at, shown)
            if like is not None:
                biases = _bias(like)[:, None]
        tail_block = torch.arange(self.tail_blocks, device=order.device)
        tail_rows = n_heads // group * n_k + tail_heads[:, None] * self.tail_blocks + tail_block
        threads = torch.get_num_threads()
        budget = CHUNK_SCORES * threads * (THREADED if threads > 1 else 1)
        sorted_whole, sorted_counts, sorted_masked = (x.tolist() for x in (whole, counts, masked))
        kinds = [(m, count > 0) for m, count in zip(sorted_masked, sorted_counts, strict=True)]
        start = 0
        while start < len(order):
            n = sorted_counts[start]
            per_row = stack * plan.block_q * max((n + self.tail_blocks) * plan.block_k, 1)
            stop = min(start + max(1, budget // per_row), len(order))
            while kinds[stop - 1] != kinds[start]:
                stop -= 1
            rows = slice(start, stop)
            read, hidden, bias = kv_rows[rows, :n], None, None
            free = min(sorted_whole[start:stop])
            if free < n:
                listed = torch.arange(n, device=order.device) < counts[rows, None]
                # Shorter lists repeat one of their own blocks: a weight of 0 would not cancel NaN in another block.
                read = torch.where(listed, read, read[:, :1])
                q_pos = self._q_pos(q_blocks[rows], q_heads[rows], heads)
                some = indices[rows, free:n], listed[:, free:]
                hidden = ~self._visible(q_blocks[rows], q_pos, *some, k_sizes)
            if self.columns is not None and biases is None:
                q_pos = self._q_pos(q_blocks[rows], q_heads[rows], heads)
                bias = self._column_bias(q_blocks[rows], q_pos, at[rows], shown[rows])
            if biases is not None:
                bias = biases[rows]
                if plan.q_block_sizes is not None:
                    bias = bias.masked_fill(~self._q_valid(q_blocks[rows])[..., None], -math.inf)
            if bias is not None:
                gap = self.tail_blocks * plan.block_k - self.n_tail
                bias = torch.nn.functional.pad(bias, (0, gap), value=-math.inf)
                read = torch.cat([read, tail_rows[rows]], 1)
            yield Chunk(
                rows=rows if in_order else order[rows],
                kv_rows=read.flatten(),
                free=free * plan.block_k,
                exact=n * plan.block_k,
                hidden=hidden,
                tail_bias=bias,
            )
            start = stop

    def _q_pos(self, q_block: Tensor, q_head: Tensor, heads: slice) -> Tensor:
        """Return the positions `[c, BQ]` of the rows of some query blocks."""
        by_block = self.q_pos.unflatten(-1, (-1, self.plan.block_q))
        return by_block[q_head + heads.start if len(by_block) > 1 else 0, q_block]

    def _column_bias(self, q_block: Tensor, q_pos: Tensor, at: Tensor, shown: Tensor) -> Tensor:
        """Return the bias of columns, `[c, 1 or BQ, C]`: 0 where a column is read, else -inf."""
        shown = shown[:, None]
        if self.plan.positional:
            shown = shown & self.plan.visible(q_pos[..., None], at[:, None])
        if self.plan.q_block_sizes is not None:
            shown = shown & self._q_valid(q_block)[..., None]
        return _bias(shown)

    def _columns_shown(
        self, batch: int, heads: slice, q_heads: Tensor, covered: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the columns of each row of blocks, `[R, C]`, and the mask of columns outside its listed blocks."""
        at, valid = (x[q_heads] for x in self.columns_of(batch, heads))
        return at, valid & ~covered.gather(1, at // self.plan.block_k)

    def _rows_see_alike(
        self, q_blocks: Tensor, q_heads: Tensor, at: Tensor, shown: Tensor
    ) -> Tensor | None:
        """Return the mask of columns that the queries of each block read, `[R, C]`; None if queries of a block differ.

        Usually they do not differ: blocks on the diagonal are listed, so every other column is before or after all
        queries of the block.
        """
        plan = self.plan
        if plan.q_block_sizes is not None or plan.window is not None:
            return None
        if not plan.positional:
            return shown
        first, last = (
            (x[q_heads] if len(x) > 1 else x.expand(len(q_heads), -1)).gather(1, q_blocks[:, None])
            for x in row_ends(plan)
        )
        seen = at <= first
        return shown & seen if bool((seen | (at > last) | ~shown).all()) else None

    def _visible(
        self, q_block: Tensor, q_pos: Tensor, blocks: Tensor, listed: Tensor, k_sizes: Tensor
    ) -> Tensor:
        plan, device = self.plan, blocks.device
        token = torch.arange(plan.block_k, device=device)
        visible = ((token < k_sizes[blocks][..., None]) & listed[..., None]).flatten(1)[:, None]
        if plan.positional:
            k_pos = (blocks[..., None] * plan.block_k + token).flatten(1)
            visible = visible & plan.visible(q_pos[..., None], k_pos[:, None])
        if plan.q_block_sizes is not None:
            visible = visible & self._q_valid(q_block)[..., None]
        return visible

    def _q_valid(self, q_block: Tensor) -> Tensor:
        token = torch.arange(self.plan.block_q, device=q_block.device)
        return token < self.plan.q_sizes()[q_block][:, None]


def _blocked(
    x: Tensor,
    n: int,
    block: int,
    dtype: torch.dtype,
    sizes: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Return `[H, L, D]` as `[H * n, block, D]` in `dtype`, zero-padded; a view if possible.

    Args:
        x: tokens `[H, L, D]`.
        n: number of blocks.
        block: tokens per block.
        dtype: dtype of the result.
        sizes: number of valid tokens of each block, `[n]`. The rest is set to 0, because padding may hold NaN, which a
            weight of zero would not cancel.
        out: tensor for the result. Default: a new one, or a view.
    """
    heads, length, d = x.shape
    owned = out is not None or length != n * block
    if not owned:
        out = x.to(dtype).reshape(heads * n, block, d)
    elif out is None:
        out = x.new_empty(heads * n, block, d, dtype=dtype)
    if owned:
        by_head = out.view(heads, n * block, d)
        by_head[:, :length] = x
        by_head[:, length:] = 0
    if sizes is None:
        return out
    padding = (torch.arange(block, device=x.device) >= sizes[:, None])[..., None]
    by_block = out.view(heads, n, block, d)
    # A view is the caller's memory and must not be changed.
    fill = by_block.masked_fill_ if owned else by_block.masked_fill
    return fill(padding, 0.0).flatten(0, 1)


def unblocked(x: Tensor, heads: int, length: int) -> Tensor:
    return x.reshape(heads, -1, x.shape[-1])[:, :length]


def stages(
    q: Tensor, k: Tensor, layout: Layout, dtype: torch.dtype
) -> Iterator[tuple[int, slice, slice]]:
    """Yield (batch entry, query heads, key heads) of each stage. If keys must be copied, a stage has few heads."""
    plan, kv_heads = layout.plan, k.shape[1]
    group = q.shape[1] // kv_heads
    per_head = plan.num_k_blocks * plan.block_k * (2 + 2 * group) * k.shape[-1] * dtype.itemsize
    is_view = k.is_contiguous() and k.dtype == dtype and plan.kv_len % plan.block_k == 0
    is_view = is_view and q.is_contiguous() and plan.q_len % plan.block_q == 0
    padding = (plan.q_block_sizes, plan.k_block_sizes, plan.kv_lengths)
    is_view = is_view and all(sizes is None for sizes in padding) and not layout.has_tail
    step = kv_heads if is_view else max(1, min(kv_heads, STAGE_BYTES // per_head))
    for b in range(q.shape[0]):
        for h in range(0, kv_heads, step):
            end = min(h + step, kv_heads)
            yield b, slice(h * group, end * group), slice(h, end)


def _lists(plan: SparsePlan) -> tuple[Tensor, Tensor, Tensor]:
    """Return the number of whole blocks and of all blocks that each row reads, and their indices, whole blocks first."""
    whole, partial = plan.full_kv_num_blocks, plan.kv_num_blocks
    counts = whole + partial
    both = [x.expand(*counts.shape, -1) for x in (plan.full_kv_indices, plan.kv_indices)]
    place = torch.arange(max(1, int(counts.max())), device=plan.device)
    after = place - whole[..., None]
    width = both[0].shape[-1]
    source = torch.where(after < 0, place, after + width)
    unlisted = (whole > width)[..., None]  # rows without a list read the first blocks
    source = source.masked_fill((place >= counts[..., None]) | (unlisted & (after < 0)), 0)
    indices = torch.cat(both, -1).long().gather(-1, source)
    return whole, counts, torch.where(unlisted & (after < 0), place, indices)


def _bias(shown: Tensor) -> Tensor:
    """Return 0 where a key is read and -inf elsewhere, fp32."""
    bias = torch.zeros(shown.shape, device=shown.device, dtype=torch.float32)
    return bias.masked_fill(~shown, -math.inf)
