"""Conversion of a plan into FlexAttention's `BlockMask`."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dit_accel.kernels.lists import Lists, block_lists, block_mask
from dit_accel.kernels.plan_data import PlanData

_BLOCK = 128


def check(plan: PlanData) -> None:
    """Raise ValueError for a plan that a `BlockMask` cannot express; the message names the field."""
    for name in ("columns", "q_order"):
        if getattr(plan, name) is not None:
            raise ValueError(
                f"{name}: FlexAttention's BlockMask cannot express it; accepted is None"
            )
    if plan.device.type == "cuda" and (plan.block_q % 16 or plan.block_k % 16):
        raise ValueError(
            f"plan: blocks of {plan.block_q} and {plan.block_k} tokens; FlexAttention on a GPU accepts "
            "multiples of 16"
        )


def to_flex(plan: PlanData) -> BlockMask:
    """Return a plan as a `BlockMask`; see `SparsePlan.to_flex`."""
    check(plan)
    partial, full = _block_kinds(plan)
    lengths, size = (plan.q_len, plan.kv_len), (plan.block_q, plan.block_k)
    return _block_mask(partial, full, lengths, size, _mask_mod(plan, partial | full))


def every_block(q_len: int, kv_len: int, device: torch.device, mask_mod) -> BlockMask:
    """Return the `BlockMask` of a mask function that is evaluated in every block."""
    n_q, n_k = (-(-n // _BLOCK) for n in (q_len, kv_len))
    partial = torch.ones(1, 1, n_q, n_k, dtype=torch.bool, device=device)
    none = torch.zeros_like(partial)
    return _block_mask(partial, none, (q_len, kv_len), (_BLOCK, _BLOCK), mask_mod)


def row_blocks(plan: PlanData) -> Tensor:
    """Return the query block of each row, `[Lq]`, int32; T_q for padding."""
    return _block_of_token(plan.q_len, plan.block_q, plan.q_sizes())


def _block_of_token(length: int, block: int, sizes: Tensor) -> Tensor:
    """Return the block of each token, `[..., length]`, for block sizes `[..., n]`. Padding gets the index n."""
    token = torch.arange(length, device=sizes.device)
    index = token // block
    valid = token % block < sizes[..., index]
    return torch.where(valid, index, sizes.shape[-1]).int()


def _block_kinds(plan: PlanData) -> tuple[Tensor, Tensor]:
    """Return the masks of the blocks that need an element mask and of those that do not, two `[B|1, Hq|1, T_q, T_k]`."""
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
    """Return the `mask_mod` of FlexAttention: a function that returns whether a query sees a key.

    The function repeats the information of the block lists. Uncompiled FlexAttention ignores the lists, and the FLASH
    kernel ignores them for a mask function that is always True (pytorch issue 188322). The function reads tensors
    only, because a Python number that changes between calls becomes a symbol, which the FLASH kernel refuses.
    """
    rows = row_blocks(plan)
    keys = _block_of_token(plan.kv_len, plan.block_k, plan.k_sizes())  # [B|1, Lk]
    # Padding gets an additional row and column of blocks, in which nothing is read.
    blocks = torch.nn.functional.pad(blocks, (0, 1, 0, 1))
    b_blocks, h_blocks, b_keys = len(blocks) > 1, blocks.shape[1] > 1, len(keys) > 1
    last = torch.arange(plan.q_len, dtype=torch.int32, device=plan.device) + plan.q_offset
    causal, window = plan.causal, plan.window is not None
    first = last if plan.window is None else last - plan.window
    sink = torch.arange(plan.kv_len, device=plan.device) < plan.sink

    def mask_mod(b, h, q, k):
        i_k = keys[b if b_keys else 0, k]
        seen = blocks[b if b_blocks else 0, h if h_blocks else 0, rows[q], i_k]
        if causal:
            seen = seen & (k <= last[q])
        if window:
            seen = seen & ((k > first[q]) | sink[k])
        return seen

    return mask_mod


def _block_mask(
    partial: Tensor, full: Tensor, lengths: tuple[int, int], size: tuple[int, int], mask_mod
) -> BlockMask:
    # `BlockMask.from_kv_blocks` transposes with vmap, which does not run inside an operator.
    partial_q, full_q = _lists(partial.mT), _lists(full.mT)
    partial_kv, full_kv = _lists(partial), _lists(full)
    return BlockMask(
        lengths,
        partial_kv.counts,
        partial_kv.indices,
        full_kv.counts,
        full_kv.indices,
        partial_q.counts,
        partial_q.indices,
        full_q.counts,
        full_q.indices,
        BLOCK_SIZE=size,
        mask_mod=mask_mod,
    )


def _lists(mask: Tensor) -> Lists:
    """Return the True entries of each row in lists as wide as the mask, because BlockMask takes the width for T_k."""
    lists = block_lists(mask)
    pad = mask.shape[-1] - lists.indices.shape[-1]
    return Lists(lists.counts, torch.nn.functional.pad(lists.indices, (0, pad)))
