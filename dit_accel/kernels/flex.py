"""A plan as FlexAttention's `BlockMask`."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dit_accel.kernels.lists import Lists, block_lists, block_mask
from dit_accel.kernels.plan_data import PlanData


def to_flex(plan: PlanData) -> BlockMask:
    """See `SparsePlan.to_flex`."""
    for name in ("columns", "q_order"):
        if getattr(plan, name) is not None:
            raise ValueError(f"{name}: FlexAttention's BlockMask has no such thing")
    partial, full = _block_kinds(plan)
    n_k = plan.num_k_blocks
    partial_lists, full_lists = (_whole_width(block_lists(x), n_k) for x in (partial, full))
    return BlockMask.from_kv_blocks(
        *partial_lists,
        *full_lists,
        BLOCK_SIZE=(plan.block_q, plan.block_k),
        mask_mod=_mask_mod(plan, partial | full),
        seq_lengths=(plan.q_len, plan.kv_len),
    )


def _block_kinds(plan: PlanData) -> tuple[Tensor, Tensor]:
    """Blocks that need the element rule, and those that do not, two `[B|1, Hq|1, T_q, T_k]`."""
    full = block_mask(plan.full_kv_num_blocks, plan.full_kv_indices, plan.num_k_blocks)
    partial = block_mask(plan.kv_num_blocks, plan.kv_indices, plan.num_k_blocks)
    partial, full = torch.broadcast_tensors(partial, full)
    if plan.q_block_sizes is not None:
        # FlexAttention would let the padding of a query tile attend to a full block.
        start = torch.arange(plan.num_q_blocks, device=plan.device) * plan.block_q
        short = plan.q_sizes() < (plan.q_len - start).clamp(max=plan.block_q)
        partial, full = partial | (full & short[:, None]), full & ~short[:, None]
    return partial, full


def _mask_mod(plan: PlanData, blocks: Tensor):
    q_sizes, k_sizes = plan.q_sizes(), plan.k_sizes()
    b_blocks, h_blocks, b_sizes = len(blocks) > 1, blocks.shape[1] > 1, len(k_sizes) > 1

    def mask_mod(b, h, q, k):
        i_q, i_k = q // plan.block_q, k // plan.block_k
        size = k_sizes[b if b_sizes else 0, i_k]
        seen = (k % plan.block_k < size) & (q % plan.block_q < q_sizes[i_q])
        # Uncompiled, FlexAttention knows no lists, only this function.
        seen = seen & blocks[b if b_blocks else 0, h if h_blocks else 0, i_q, i_k]
        if plan.causal:
            seen = seen & (k <= q + plan.q_offset)
        if plan.window is not None:
            seen = seen & ((k > q + plan.q_offset - plan.window) | (k < plan.sink))
        return seen

    return mask_mod


def _whole_width(lists: Lists, n_k: int) -> Lists:
    """BlockMask converts lists to masks by their width, so they have to be T_k wide."""
    pad = n_k - lists.indices.shape[-1]
    return Lists(lists.counts, torch.nn.functional.pad(lists.indices, (0, pad)))
