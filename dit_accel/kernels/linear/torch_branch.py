"""Linear branch in plain torch, in state space: one matrix product sums the blocks of each row.

Each key block j has H_j = phi(K_j)^T V_j and Z_j = sum phi(K_j). With W, the 0/1 matrix of the linear sets, row i has
H_i = sum_j W_ij H_j. Sums are not computed as differences (except with a caller's state), so no bits cancel. A few blocks
of one head are computed at a time, so that features are used while they are in the cache.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.linear.mix import Mix, alpha_per_block
from dit_accel.kernels.linear.spec import Linear
from dit_accel.kernels.linear.token_blocks import Scratch, TokenBlocks
from dit_accel.kernels.plan import SparsePlan
from dit_accel.kernels.precision import wide
from dit_accel.kernels.row_order import in_block_order, in_query_order

# Bytes of the states of query blocks that are computed together. In the backward pass their gradients take as much again.
STATE_BYTES = 2**26


class State(NamedTuple):
    """Sums over keys: one for all rows, or one per query block."""

    kv: Tensor
    """H: `[D, Dv]`, or per block `[n, D, Dv]`."""
    z: Tensor
    """Z: `[D]`, or per block `[n, D]`."""


class Part(NamedTuple):
    """Factors of the last product of some query blocks of one head."""

    batch: int
    head: int
    blocks: slice
    phi: Tensor
    """phi(q) / denominator, `[n, BQ, D]`."""
    norm: Tensor
    """1 / denominator, `[n, BQ]`; 0 where the linear set is empty."""
    kv: Tensor
    """H as in `State`: `[D, Dv]`, or per block `[n, D, Dv]`. One state for all rows may be projected."""

    def product(self, out: Tensor) -> Tensor:
        """Return o_l of these rows, `[n, BQ, Dv]`, in `out`."""
        if self.kv.ndim == 3:
            return torch.bmm(self.phi, self.kv, out=out)
        torch.mm(self.phi.flatten(0, 1), self.kv, out=out.view(-1, out.shape[-1]))
        return out


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, linear: Linear
) -> tuple[Tensor, Tensor]:
    """Return `o_l` `[B, Hq, Lq, Dv]` and 1 / denominator `[B, Hq, Lq]`; 0 where the linear set is empty."""
    q = in_block_order(q, plan)
    o_l = q.new_empty(*q.shape[:-1], v.shape[-1])
    norm = q.new_empty(q.shape[:-1], dtype=wide(q))
    rows, scratch = TokenBlocks.of_queries(plan, wide(q)), Scratch()
    for part in parts(q, k, v, plan, linear, scratch):
        rows.store(norm[part.batch, part.head, :, None], part.blocks, part.norm[..., None])
        with rows.writing(o_l[part.batch, part.head], part.blocks, scratch) as out:
            part.product(out)
    return in_query_order(o_l, plan), in_query_order(norm, plan)


def mix_(
    o: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, linear: Linear, mix: Mix
) -> None:
    """Compute o + o_l W^T + b, or alpha o + (1 - alpha) o_l, in place, without storing o_l.

    `o` and `q` `[B, Hq, Lq, D]` are in the order of the plan's blocks.
    """
    dtype = wide(q)
    rows, scratch = TokenBlocks.of_queries(plan, dtype), Scratch()
    weight, bias = (None if x is None else x.to(dtype) for x in mix[:2])
    alpha = None if mix.alpha is None else alpha_per_block(mix.alpha.to(dtype), plan, linear.scope)
    for part in parts(q, k, v, plan, linear, scratch, weight):
        with rows.updating(o[part.batch, part.head], part.blocks) as out:
            flat = out.view(-1, out.shape[-1])
            if weight is not None and part.kv.ndim == 2:
                flat.addmm_(part.phi.flatten(0, 1), part.kv)
            else:
                o_l = part.product(scratch.take("o_l", part.phi, *out.shape))
                if alpha is not None:
                    of_head = alpha[part.batch if len(alpha) > 1 else 0, part.head, part.blocks]
                    torch.lerp(o_l, out, of_head[:, None, None], out=out)
                else:
                    assert weight is not None
                    flat.addmm_(o_l.flatten(0, 1), weight.T)
            if bias is not None:
                out += bias


def parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    linear: Linear,
    scratch: Scratch,
    weight: Tensor | None = None,
) -> Iterator[Part]:
    """Yield the query blocks of all heads, with `q` in the order of the plan's blocks. A part is valid until the next one.

    If one state serves all rows, it is projected by `weight` `[Dv, Dv]`, at a very small cost.
    """
    rows = TokenBlocks.of_queries(plan, wide(q))
    keys = TokenBlocks.of_keys(plan, wide(q))
    summed = blocks_to_sum(plan, linear)
    for b, h_kv, heads in groups(q, k):
        totals = None
        if linear.state is not None:
            kv, z = (x[b, h_kv].to(wide(q)) for x in linear.state)
            totals = State(kv, z)
        per_block = None
        if linear.scope != "all" or totals is None:
            per_block = key_states(k[b, h_kv], v[b, h_kv], keys, b, linear, scratch)
        if linear.scope == "all" and weight is not None:
            every = totals or per_block
            assert every is not None
            totals = State(every.kv @ weight.T, every.z)
        for h in heads:
            weights = weights_of(summed, b, h, wide(q))
            for some, state in row_states(per_block, weights, totals, scratch):
                for blocks in rows.chunks(q.shape[-1], some):
                    phi = rows.features(q[b, h], blocks, linear.feature_map, scratch)
                    here = slice(blocks.start - some.start, blocks.stop - some.start)
                    kv, z = (x if weights is None else x[here] for x in state)
                    total = _dot(phi, z)
                    if linear.scope == "all":
                        total += 1e-5
                    floor: Tensor | float = 0.0
                    if totals is not None and weights is not None:
                        # A rest below the rounding error of the subtraction counts as 0.
                        floor = _dot(phi, totals.z) * (32 * torch.finfo(total.dtype).eps)
                    valid = total > floor
                    norm = torch.where(valid, 1 / torch.where(valid, total, 1.0), 0.0)
                    padding = rows.padding_of(blocks)
                    if padding is not None:
                        norm.masked_fill_(padding, 0.0)
                    yield Part(b, h, blocks, phi.mul_(norm[..., None]), norm, kv)


def groups(q: Tensor, k: Tensor) -> Iterator[tuple[int, int, range]]:
    """Yield batch entry, key head, and the query heads of the key head."""
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(k.shape[1]):
            yield b, h, range(h * group, (h + 1) * group)


def blocks_to_sum(plan: SparsePlan, linear: Linear) -> Tensor | None:
    """Return the mask of blocks that each row sums, `[B|1, Hq|1, T_q, T_k]`; None: all rows sum all blocks."""
    if linear.scope == "all":
        return None
    summed = plan.linear_blocks(linear.scope)
    # With the caller's totals: the blocks to subtract from them.
    return summed if linear.state is None else ~summed


def weights_of(summed: Tensor | None, batch: int, head: int, dtype: torch.dtype) -> Tensor | None:
    """Return the mask of one head as numbers, `[T_q, T_k]`."""
    if summed is None:
        return None
    summed = summed[batch if len(summed) > 1 else 0]
    return summed[head if len(summed) > 1 else 0].to(dtype)


def key_states(
    k: Tensor, v: Tensor, keys: TokenBlocks, batch: int, linear: Linear, scratch: Scratch
) -> State:
    """Return H and Z of one key head: of each key block, or of all keys for the scope "all"."""
    every = linear.scope == "all"
    shape = (k.shape[-1], v.shape[-1]) if every else (keys.count, k.shape[-1], v.shape[-1])
    kv = scratch.take("key states", keys.like(k), *shape)
    z = keys.like(k).new_zeros(shape[:-1])
    if every:
        kv.zero_()
    for blocks in keys.chunks(k.shape[-1]):
        phi = keys.features(k, blocks, linear.feature_map, scratch, batch)
        values = keys.load(v, blocks, batch)
        if every:
            kv.addmm_(phi.flatten(0, 1).T, values.flatten(0, 1))
            z += phi.sum((0, 1))
        else:
            torch.bmm(phi.mT, values, out=kv[blocks])
            torch.sum(phi, 1, out=z[blocks])
    return State(kv, z)


def row_states(
    per_block: State | None, weights: Tensor | None, totals: State | None, scratch: Scratch
) -> Iterator[tuple[slice, State]]:
    """Yield some query blocks and their sums over keys, within the memory limit. A state is valid until the next one."""
    if weights is None:
        state = totals or per_block
        assert state is not None
        yield slice(0, None), state
        return
    assert per_block is not None
    d, d_v = per_block.kv.shape[1:]
    step = max(1, STATE_BYTES // (d * (d_v + 1) * per_block.kv.itemsize))
    for start in range(0, len(weights), step):
        some = slice(start, min(start + step, len(weights)))
        kv = scratch.take("row states", per_block.kv, some.stop - start, d * d_v)
        torch.mm(weights[some], per_block.kv.flatten(1), out=kv)
        kv, z = kv.view(-1, d, d_v), weights[some] @ per_block.z
        if totals is not None:
            kv, z = torch.sub(totals.kv, kv, out=kv), totals.z - z
        yield some, State(kv, z)


def _dot(rows: Tensor, z: Tensor) -> Tensor:
    """Return the products of rows `[n, BQ, D]` with one vector `[D]`, or one per block `[n, D]`: `[n, BQ]`."""
    if z.ndim == 1:
        return (rows.flatten(0, 1) @ z).view(rows.shape[:2])
    return torch.linalg.vecdot(rows, z[:, None])
