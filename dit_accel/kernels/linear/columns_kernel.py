"""Backward kernel of the linear branch, key side: one program owns a key tile.

    dphi(k) = sum n (g . v - t) phi(q)   dv = sum n phi(q) . phi(k) g        (README.md, equation 5)

summed over the rows i whose linear set holds the block. LINEAR 1: the totals over all rows. LINEAR 2: where HEAVY is 1,
the sum over the rows on the block's list; where it is 0, the totals minus the rows on the list.
"""

import triton
import triton.language as tl

from dit_accel.kernels.tile_math import (
    LENGTHS,
    aligned,
    block_size,
    last_key,
    load_rows,
    phi,
    phi_backward,
    query_size,
    sized_rows,
)


@triton.jit(do_not_specialize=LENGTHS)
def linear_columns_kernel(
    K, V, GRAD_K, GRAD_V, ROW_NUM, ROW_INDEX, HEAVY, K_SIZES, KV_LENGTHS, Q_SIZES, Q_ORDER,
    PHI_Q, STATE, STATE_Z, GRAD_O_L, NORM, TERM,
    k_b, k_h, k_l, v_b, v_h, v_l, q_len, k_len, n_k, n_row,
    list_b, list_h, order_h, group, per_key, n_keys,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    LINEAR: tl.constexpr, FEATURE: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one key tile. STATE: sums over all rows of n phi(q)^T g and n t phi(q), per key."""
    k_b, k_h, k_l = aligned(k_b, ALIGNED), aligned(k_h, ALIGNED), aligned(k_l, ALIGNED)
    v_b, v_h, v_l = aligned(v_b, ALIGNED), aligned(v_h, ALIGNED), aligned(v_l, ALIGNED)
    SUB_K: tl.constexpr = (BLOCK_K + TK - 1) // TK
    SUB_Q: tl.constexpr = (BLOCK_Q + TQ - 1) // TQ
    MASK_D: tl.constexpr = HEAD_DIM != DP
    MASK_V: tl.constexpr = VALUE_DIM != DVP
    i_kh, i_b = tl.program_id(1), tl.program_id(2)
    n_kh = tl.num_programs(1)
    i_block = tl.program_id(0) // SUB_K
    o_in = (tl.program_id(0) % SUB_K) * TK + tl.arange(0, TK)
    o_key = i_block * BLOCK_K + o_in
    m_k = o_in < block_size(i_block, last_key(KV_LENGTHS, i_b, k_len), K_SIZES, BLOCK_K)
    m_row = (o_in < BLOCK_K) & (o_key < k_len)
    o_d, o_v = tl.arange(0, DP), tl.arange(0, DVP)
    m_d, m_v = o_d < HEAD_DIM, o_v < VALUE_DIM
    i_bk = (i_b * n_kh + i_kh).to(tl.int64)
    K += i_b.to(tl.int64) * k_b + i_kh.to(tl.int64) * k_h
    V += i_b.to(tl.int64) * v_b + i_kh.to(tl.int64) * v_h
    # [TK, DP], [TK, DVP]
    b_x = load_rows(K, o_key, m_k, k_l, o_d, m_d, MASK_D)
    b_v = load_rows(V, o_key, m_k, v_l, o_v, m_v, MASK_V)
    b_phik = phi(b_x.to(tl.float32), m_d, FEATURE).to(b_v.dtype)
    # Totals first, while registers are free: [DP, DVP], [DP].
    b_h = load_rows(STATE + i_bk * HEAD_DIM * VALUE_DIM, o_d, m_d, VALUE_DIM, o_v, m_v, MASK_V)
    b_z = tl.load(STATE_Z + i_bk * HEAD_DIM + o_d, mask=m_d, other=0.0)
    b_dv = tl.dot(b_phik, b_h, input_precision=PRECISION)
    b_dphi = tl.dot(b_v, tl.trans(b_h), input_precision=PRECISION) - b_z[None, :]
    b_dphi = b_dphi * n_keys
    if LINEAR >= 2:
        heavy = tl.load(HEAVY + i_bk * n_k + i_block) != 0
        sign = tl.where(heavy, 1.0, -1.0)
        b_dv = tl.where(heavy, 0.0, b_dv)
        b_dphi = tl.where(heavy, 0.0, b_dphi)
        for g in range(0, group):
            i_h = i_kh * group + g
            i_bh = (i_b * n_kh * group + i_h).to(tl.int64)
            i_row = ((i_b * list_b + i_h * list_h) * n_k + i_block).to(tl.int64)
            p_index = ROW_INDEX + i_row * n_row
            p_phi = PHI_Q + i_bh * q_len * HEAD_DIM
            p_g = GRAD_O_L + i_bh * q_len * VALUE_DIM
            count = tl.load(ROW_NUM + i_row)
            i_next = tl.load(p_index, mask=count > 0, other=0)
            size_next = query_size(i_next, Q_SIZES, BLOCK_Q)
            for t in tl.range(0, count * SUB_Q):
                i_q, size = i_next, size_next
                i_next = tl.load(p_index + (t + 1) // SUB_Q, mask=t + 1 < count * SUB_Q, other=0)
                size_next = query_size(i_next, Q_SIZES, BLOCK_Q)
                o_q = (t % SUB_Q) * TQ + tl.arange(0, TQ)
                o_row, m_q, _ = sized_rows(i_q, size, o_q, i_h, Q_ORDER, order_h, q_len, BLOCK_Q)
                # [TQ, DP], [TQ, DVP]
                b_phiq = load_rows(p_phi, o_row, m_q, HEAD_DIM, o_d, m_d, MASK_D)
                b_g = load_rows(p_g, o_row, m_q, VALUE_DIM, o_v, m_v, MASK_V)
                b_n = tl.load(NORM + i_bh * q_len + o_row, mask=m_q, other=0.0) * sign
                b_t = tl.load(TERM + i_bh * q_len + o_row, mask=m_q, other=0.0)
                # [TK, TQ]
                b_a = tl.dot(b_phik, tl.trans(b_phiq), input_precision=PRECISION)
                b_a = (b_a * (b_n * per_key)[None, :]).to(b_g.dtype)
                b_dv = tl.dot(b_a, b_g, b_dv, input_precision=PRECISION)
                b_da = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION) - b_t[None, :]
                b_da = (b_da * b_n[None, :]).to(b_phiq.dtype)
                b_dphi = tl.dot(b_da, b_phiq, b_dphi, input_precision=PRECISION)
    b_x = b_x.to(tl.float32)
    b_dk = phi_backward(b_x, phi(b_x, m_d, FEATURE), b_dphi * per_key, FEATURE)
    o_out = i_bk * k_len + o_key
    tl.store(
        GRAD_K + o_out[:, None] * HEAD_DIM + o_d[None, :],
        tl.where(m_k[:, None], b_dk, 0.0).to(GRAD_K.dtype.element_ty),
        mask=m_row[:, None] & m_d[None, :],
    )
    tl.store(
        GRAD_V + o_out[:, None] * VALUE_DIM + o_v[None, :],
        tl.where(m_k[:, None], b_dv, 0.0).to(GRAD_V.dtype.element_ty),
        mask=m_row[:, None] & m_v[None, :],
    )
