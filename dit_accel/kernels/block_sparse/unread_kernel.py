"""Kernel of the weights of block means: the number of keys of each block that a row does not read."""

import triton
import triton.language as tl

from dit_accel.kernels.tile_math import (
    LENGTHS,
    block_size,
    last_key,
    padded_blocks,
)


@triton.jit(do_not_specialize=LENGTHS)
def unread_kernel(
    FULL_NUM, FULL_INDEX, PART_NUM, PART_INDEX, K_SIZES, KV_LENGTHS, UNREAD,
    k_len, n_q, n_k, n_full, n_part, list_b, list_h,
    BLOCK_K: tl.constexpr, TN: tl.constexpr,
):  # fmt: skip
    """Write UNREAD `[B|1, Hq|1, T_q, padded_blocks(T_k)]`, fp16 or fp32.

    An entry is log2 of the number of keys of the block, or -inf if the row reads the block or the block is empty. The
    logarithm is computed here, because in the loop of the attention kernels it costs more than all other operations.
    """
    i_row = (tl.program_id(2) * list_b + tl.program_id(1) * list_h) * n_q + tl.program_id(0)
    i_row = i_row.to(tl.int64)
    k_end = last_key(KV_LENGTHS, tl.program_id(2), k_len)
    UNREAD += i_row * padded_blocks(n_k)
    o_n = tl.arange(0, TN)
    for start in range(0, padded_blocks(n_k), TN):
        o_block = start + o_n
        m_b = o_block < n_k
        size = block_size(tl.where(m_b, o_block, 0), k_end, K_SIZES, BLOCK_K)
        b_log = tl.log2(tl.maximum(size, 1).to(tl.float32))
        b_log = tl.where(m_b & (size > 0), b_log, float("-inf"))
        tl.store(UNREAD + o_block, b_log.to(UNREAD.dtype.element_ty))
    tl.debug_barrier()  # threads overwrite what other threads of the program wrote
    full, part = tl.load(FULL_NUM + i_row), tl.load(PART_NUM + i_row)
    nothing = tl.full([TN], float("-inf"), UNREAD.dtype.element_ty)
    for start in range(0, full, TN):
        m_n = start + o_n < full
        o_block = tl.load(FULL_INDEX + i_row * n_full + start + o_n, mask=m_n, other=0)
        tl.store(UNREAD + o_block, nothing, mask=m_n)
    for start in range(0, part, TN):
        m_n = start + o_n < part
        o_block = tl.load(PART_INDEX + i_row * n_part + start + o_n, mask=m_n, other=0)
        tl.store(UNREAD + o_block, nothing, mask=m_n)
