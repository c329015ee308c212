"""`head_densities`: density of each head of a plan, counted from its block lists."""

import torch
from jaxtyping import Float
from torch import Tensor

from dit_accel.kernels import SparsePlan


def head_densities(plan: SparsePlan, heads: int) -> Float[Tensor, " heads"]:
    """Return the number of query-key pairs of each head, divided by that of a dense call (mean over the batch).

    This is `SparsePlan.density` per head for causal plans without a window. It needs no memory for a mask of pairs.

    Args:
        plan: plan of a call.
        heads: number of query heads.
    """
    plan = plan.for_heads(heads)
    device, block = plan.device, plan.block_q
    order = torch.arange(plan.q_len, device=device)[None]
    if plan.q_order is not None:
        order = plan.q_order.long()
    # Number of visible keys of each query of a block; 0 for the padding of the last block.
    last = order + plan.q_offset + 1
    missing = -plan.q_len % block
    seen = torch.nn.functional.pad(last, (0, missing)).unflatten(1, (-1, block))
    start = torch.arange(plan.num_k_blocks, device=device) * plan.block_k
    size = (plan.kv_len - start).clamp(max=plan.block_k)
    pairs = (seen[..., None] - start).clamp(min=0).minimum(size).sum(2).double()  # [H|1, T_q, T_k]
    read = plan.to_block_mask()
    total = (read * pairs).sum((-1, -2))
    if plan.columns is not None:
        total = total + _column_pairs(plan, read, seen)
    dense = last.clamp(max=plan.kv_len).sum(-1).double()
    return (total / dense).mean(0).expand(heads)


def _column_pairs(plan: SparsePlan, read: Tensor, seen: Tensor) -> Tensor:
    """Return the number of pairs of single columns outside of the blocks that a row reads, `[B|1, Hq|1]`."""
    assert plan.columns is not None
    columns = plan.columns.long()
    real = columns < plan.kv_len
    inside = columns.clamp(max=plan.kv_len - 1) // plan.block_k
    shape = torch.broadcast_shapes(read.shape[:2], columns.shape[:2])
    covered = (
        read.expand(*shape, -1, -1)
        .mT.gather(2, inside.expand(*shape, -1)[..., None].expand(-1, -1, -1, read.shape[2]))
        .mT
    )  # [B, H, T_q, C]
    total = torch.zeros(shape, dtype=torch.double, device=columns.device)
    for i in range(seen.shape[1]):  # one query block at a time to limit memory
        visible = (seen[None, :, i, :, None] > columns[:, :, None]).sum(2)
        total += (visible * (real & ~covered[:, :, i])).sum(-1)
    return total
