"""A plan as FlexAttention's `BlockMask`."""

from typing import TYPE_CHECKING

import torch
from torch.nn.attention.flex_attention import BlockMask

if TYPE_CHECKING:
    from dit_accel.kernels.plan import SparsePlan


def to_flex(plan: "SparsePlan") -> BlockMask:
    """See `SparsePlan.to_flex`."""
    for name in ("columns", "q_order"):
        if getattr(plan, name) is not None:
            raise ValueError(f"{name}: FlexAttention's BlockMask has no such thing")
    q_sizes, k_sizes = plan.q_sizes(), plan.k_sizes()
    per_batch = len(k_sizes) > 1

    def mask_mod(b, h, q, k):
        size = k_sizes[b, k // plan.block_k] if per_batch else k_sizes[0, k // plan.block_k]
        seen = (k % plan.block_k < size) & (q % plan.block_q < q_sizes[q // plan.block_q])
        if plan.causal:
            seen = seen & (k <= q + plan.q_offset)
        if plan.window is not None:
            seen = seen & ((k > q + plan.q_offset - plan.window) | (k < plan.sink))
        return seen

    def whole_width(indices: torch.Tensor) -> torch.Tensor:
        # BlockMask converts lists to masks by their width, so they have to be T_k wide.
        return torch.nn.functional.pad(indices, (0, plan.num_k_blocks - indices.shape[-1]))

    return BlockMask.from_kv_blocks(
        plan.kv_num_blocks,
        whole_width(plan.kv_indices),
        plan.full_kv_num_blocks,
        whole_width(plan.full_kv_indices),
        BLOCK_SIZE=(plan.block_q, plan.block_k),
        mask_mod=mask_mod,
        seq_lengths=(plan.q_len, plan.kv_len),
    )
