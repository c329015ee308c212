"""Visibility of keys under a plan: masks of pairs and of blocks, counts, and recall."""

import math

import torch
from torch import Tensor

from dit_accel.kernels.geometry import Rules
from dit_accel.kernels.plan_data import PlanData
from dit_accel.kernels.precision import wide


def positions(plan: Rules) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the positions of rows and of keys, and the masks of the valid rows and of the valid keys.

    Shapes: `[Hq|1, Lq]`, `[Lk]`, `[Lq]` and `[B|1, Lk]`, rows in the order of the query blocks.
    """
    row = torch.arange(plan.q_len, device=plan.device)
    k_pos = torch.arange(plan.kv_len, device=plan.device)
    q_pos = row[None] if plan.q_order is None else plan.q_order.long()
    q_ok = row % plan.block_q < plan.q_sizes()[row // plan.block_q]
    k_ok = k_pos % plan.block_k < plan.k_sizes()[:, k_pos // plan.block_k]
    return q_pos, k_pos, q_ok, k_ok


def row_ends(plan: Rules) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest position (plus `q_offset`) of the rows of each block, two `[Hq|1, T_q]`."""
    if plan.q_order is None:
        first = torch.arange(plan.num_q_blocks, device=plan.device) * plan.block_q
        last = (first + plan.block_q).clamp(max=plan.q_len) - 1
        return first[None] + plan.q_offset, last[None] + plan.q_offset
    pad = plan.num_q_blocks * plan.block_q - plan.q_len
    order = plan.q_order.long() + plan.q_offset
    blocks = [
        torch.nn.functional.pad(order, (0, pad), value=filler).unflatten(-1, (-1, plan.block_q))
        for filler in (2**40, -(2**40))
    ]
    return blocks[0].amin(-1), blocks[1].amax(-1)


def block_visibility(plan: Rules) -> tuple[Tensor, Tensor]:
    """Return the masks of blocks with at least one visible pair and with only visible pairs: two `[B|1, Hq|1, T_q, T_k]`.

    Missing queries of the last query block do not count, because they are never read. A key block with missing keys
    is not in the second mask, because its padding would be read. With `q_order` and a window, the first mask may
    include blocks without a visible pair.
    """
    q_sizes, k_sizes = plan.q_sizes(), plan.k_sizes()
    some = (q_sizes[:, None] > 0) & (k_sizes[:, None, None, :] > 0)
    every = some & (k_sizes[:, None, None, :] == plan.block_k)
    if plan.positional:
        q0, q1 = (x[..., None] for x in row_ends(plan))
        k0 = torch.arange(plan.num_k_blocks, device=plan.device) * plan.block_k
        k1 = k0 + k_sizes[:, None, None, :] - 1
        some, every = some & (k0 <= q1), every & (k1 <= q0)
        if plan.window is not None:
            some = some & ((k1 > q0 - plan.window) | (k0 < plan.sink))
            every = every & ((k0 > q1 - plan.window) | (k1 < plan.sink))
    return some, every


def most_partial(plan: Rules) -> int | None:
    """Return an upper bound of the number of partial blocks of one row; None: unknown."""
    if plan.k_block_sizes is not None or (plan.positional and plan.q_order is not None):
        return None
    tail = 1 + (
        plan.kv_lengths is not None
    )  # the last block of all keys, and the last block of a sample's keys
    # Number of key blocks that the diagonal, or the edge of a window, of one query block can touch.
    edge = (plan.block_q - 1) // plan.block_k + 2
    return tail + edge * (plan.causal + (plan.window is not None)) + (plan.sink > 0)


def column_members(plan: PlanData) -> Tensor:
    """Return the mask of keys that are columns, `[B|1, Hq|1, Lk]`."""
    assert plan.columns is not None
    member = torch.zeros(
        *plan.columns.shape[:2], plan.kv_len + 1, dtype=torch.bool, device=plan.device
    )
    return member.scatter_(-1, plan.columns.long(), True)[..., : plan.kv_len]


def _rows_seen(plan: PlanData, i: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the masks of the keys that the rows of block i read, `[B|1, Hq|1, BQ, Lk]`, and that the rules show."""
    q_pos, k_pos, q_ok, k_ok = positions(plan)
    at = slice(i * plan.block_q, (i + 1) * plan.block_q)
    rules = plan.visible(q_pos[:, at, None], k_pos) & q_ok[at, None] & k_ok[:, None, None]
    member = blocks[:, :, i][..., k_pos // plan.block_k]
    if plan.columns is not None:
        member = member | column_members(plan)
    return rules & member[:, :, None], rules


def pair_mask(plan: PlanData, blocks: Tensor, *, columns: bool = False) -> Tensor:
    """Return the mask of visible pairs in some blocks, `[B|1, Hq|1, Lq, Lk]`, with the queries in their own order.

    Args:
        plan: rules and columns.
        blocks: mask of the blocks, `[B|1, Hq|1, T_q, T_k]`.
        columns: also include the columns of the plan.
    """
    q_pos, k_pos, q_ok, k_ok = positions(plan)
    row = torch.arange(plan.q_len, device=plan.device)
    member = blocks[..., row // plan.block_q, :][..., k_pos // plan.block_k]
    if columns and plan.columns is not None:
        member = member | column_members(plan)[:, :, None]
    rules = plan.visible(q_pos[..., None], k_pos) & q_ok[:, None] & k_ok[:, None, None]
    mask = member & rules
    if plan.q_order is None:
        return mask
    mask = mask.expand(-1, max(mask.shape[1], len(plan.q_order)), -1, -1)
    back = plan.q_order.argsort(-1)[None, :, :, None]
    return mask.gather(2, back.expand(*mask.shape))


def density(plan: PlanData) -> Tensor:
    """Return attended pairs / pairs of a dense call, a scalar on the plan's device."""
    sizes = (plan.q_block_sizes, plan.k_block_sizes, plan.kv_lengths)
    in_order = plan.q_order is None and all(x is None for x in sizes)
    if not plan.positional and plan.columns is None:
        attended = (keys_read(plan).double() * plan.q_sizes()).sum(-1)
    elif plan.window is None and in_order:
        attended = _pairs_in_order(plan).double()
    else:
        blocks = plan.to_block_mask()
        # One query block at a time, because a [Lq, Lk] mask of a long prompt does not fit into memory.
        attended = torch.stack(
            [
                _rows_seen(plan, i, blocks)[0].sum((-1, -2)).double()
                for i in range(plan.num_q_blocks)
            ]
        ).sum(0)
    if plan.causal:
        q_pos, *_ = positions(plan)
        lengths = plan.k_sizes().sum(-1)[:, None, None]
        last = (q_pos + plan.q_offset + 1).clamp(min=0)
        dense = torch.minimum(last, lengths).sum(-1).double()
    else:
        dense = plan.q_sizes().sum().double() * plan.k_sizes().sum(-1).double()[:, None]
    attended, dense = torch.broadcast_tensors(attended, dense)
    return attended.sum() / dense.sum().clamp(min=1)


def _pairs_in_order(plan: PlanData) -> Tensor:
    """Return the number of attended pairs, `[B|1, Hq|1]`, from block lists and columns.

    For plans without window, permutation and padding: the position of a block determines its number of visible pairs.
    """
    device, offset = plan.device, plan.q_offset if plan.causal else plan.kv_len
    first = torch.arange(plan.num_q_blocks, device=device) * plan.block_q
    queries = (plan.q_len - first).clamp(max=plan.block_q)
    first = first + offset
    start = torch.arange(plan.num_k_blocks, device=device) * plan.block_k
    keys = (plan.kv_len - start).clamp(max=plan.block_k)

    def below(x: Tensor) -> Tensor:
        """Return the number of visible pairs in each key block of the queries less than x positions after its first key."""
        x, most = x.clamp(min=0), torch.minimum(x.clamp(min=0), keys)
        return most * (most + 1) // 2 + (x - most) * keys

    ahead = first[:, None] - start  # distance from the first key of the block to the first query
    pairs = below(ahead + queries[:, None]) - below(ahead)
    blocks = plan.to_block_mask()
    # One head at a time, because counts for all heads of a long prompt take gigabytes.
    read = [torch.where(blocks[:, h], pairs, 0).sum((-1, -2)) for h in range(blocks.shape[1])]
    found = torch.stack(read, 1)
    if plan.columns is None:
        return found
    at = plan.columns.long()
    inside = at.clamp(max=plan.kv_len - 1)
    shape = torch.broadcast_shapes(blocks.shape[:2], at.shape[:2])
    block = (inside // plan.block_k).expand(*shape, -1)[:, :, None]
    covered = blocks.expand(*shape, -1, -1).gather(-1, block.expand(-1, -1, plan.num_q_blocks, -1))
    behind = (first + queries)[:, None] - at[:, :, None]
    seen = torch.minimum(behind.clamp(min=0), queries[:, None])
    alone = ~covered & (at < plan.kv_len)[:, :, None]
    return found + torch.where(alone, seen, 0).sum((-1, -2))


def keys_read(plan: PlanData) -> Tensor:
    """Return the number of keys that each query of a row reads, `[B|1, Hq|1, T_q]`, from the counts of the lists.

    For plans without positions and columns.
    """
    counts, indices = plan.kv_num_blocks, plan.kv_indices
    listed = torch.arange(indices.shape[-1], device=plan.device) < counts[..., None]
    sizes = plan.k_sizes()[:, None, None, :]
    shape = torch.broadcast_shapes(counts.shape, sizes.shape[:3])
    found = sizes.expand(*shape, -1).gather(-1, indices.long().expand(*shape, -1))
    partial = torch.where(listed, found, 0).sum(-1)
    return plan.full_kv_num_blocks * plan.block_k + partial


def recall(plan: PlanData, q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """Return the exact softmax mass that the plan reads, mean over queries, `[B, Hq]`."""
    dtype = wide(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k = k.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    if plan.q_order is not None:
        q = q.gather(2, plan.q_order.long()[None, :, :, None].expand(*q.shape))
    blocks = plan.to_block_mask()
    total = q.new_zeros(q.shape[:2], dtype=dtype)
    count = torch.zeros(1, 1, dtype=torch.long, device=q.device)
    for i in range(plan.num_q_blocks):
        read, rules = _rows_seen(plan, i, blocks)
        at = slice(i * plan.block_q, (i + 1) * plan.block_q)
        logits = (q[:, :, at].to(dtype) @ k.mT * scale).masked_fill(~rules, -math.inf)
        mass = torch.softmax(logits, -1).nan_to_num(0.0)  # a query without any key
        total += (mass * read).sum((-1, -2))
        count = count + rules.any(-1).sum(-1)
    return total / count.clamp(min=1)
