"""Backward kernel of the query side. It recomputes the weights from lse, and stores nothing of size [Lq, Lk].

    p = exp(s - lse)   ds = p (dO v^T - delta)   dq = scale ds k   delta = dO . o - dlse

For the linear branch, with n = 1 / denominator, g = dO_l, t = g . o_l:

    da = n (g v^T - t)   dphi(q) = da phi(k)                       (README.md, equations 4 and 5)

With LINEAR 2, a sum over the linear set is the total minus the blocks that the row reads or skips. With LINEAR 3,
each row uses either this difference or the direct sum, as in the forward kernel.
"""

import triton
import triton.language as tl

from dit_accel.kernels.tile_math import (
    LENGTHS,
    aligned,
    block_size,
    column_keys,
    covered,
    last_key,
    load_rows,
    load_tile,
    mean_weights,
    phi,
    phi_backward,
    query_rows,
    visible,
)


@triton.jit
def _rows_step(
    b_q, b_k, b_v, b_do, b_lse, b_delta, b_bias, m_s, b_dq, scale,
    MASKED: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # [TQ, TK]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    if BIAS:
        b_s += b_bias[None, :]
    b_p = tl.exp2(b_s - b_lse[:, None])
    if MASKED:
        b_p = tl.where(m_s, b_p, 0.0)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[:, None])
    # [TQ, DP]
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit
def _rows_walk(
    b_q, b_do, b_lse, b_delta, b_g, b_t, b_dq, b_dphi,
    K, V, PHI_K, INDEX, K_SIZES, count,
    k_l, v_l, o_d, m_d, o_v, m_v, q_pos, k_end, q_offset, window, sink, scale, weight,
    BLOCK_K: tl.constexpr, TK: tl.constexpr, HEAD_DIM: tl.constexpr,
    MASK_D: tl.constexpr, MASK_V: tl.constexpr, MASKED: tl.constexpr, POSITIONAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTMAX: tl.constexpr, LINEAR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    SUB: tl.constexpr = (BLOCK_K + TK - 1) // TK
    o_n = tl.arange(0, TK)
    i_next = tl.load(INDEX, mask=count > 0, other=0)
    size_next = TK
    if MASKED and K_SIZES is not None:  # a loaded size is carried from step to step, like the index
        size_next = block_size(i_next, k_end, K_SIZES, BLOCK_K)
    for t in tl.range(0, count * SUB):
        i_k, size = i_next, size_next
        i_next = tl.load(INDEX + (t + 1) // SUB, mask=t + 1 < count * SUB, other=0)
        o_first = (t % SUB) * TK
        start = i_k * BLOCK_K + o_first
        m_s = None
        if MASKED:
            if K_SIZES is not None:
                size_next = block_size(i_next, k_end, K_SIZES, BLOCK_K)
            else:
                size = block_size(i_k, k_end, None, BLOCK_K)
            size = size - o_first
            m_s = o_n[None, :] < size
            if POSITIONAL:
                m_s = m_s & visible(q_pos, start + o_n, q_offset, window, sink, WINDOW)
        # [TK, DVP]
        b_v = load_tile(V, start, size, v_l, o_n, o_v, m_v, MASKED, MASK_V)
        if SOFTMAX:
            # [TK, DP]
            b_k = load_tile(K, start, size, k_l, o_n, o_d, m_d, MASKED, MASK_D)
            b_dq = _rows_step(
                b_q,
                b_k,
                b_v,
                b_do,
                b_lse,
                b_delta,
                None,
                m_s,
                b_dq,
                scale,
                MASKED,
                False,
                PRECISION,
            )
        if LINEAR:
            # [TK, DP]; keys that are padding have phi = 0
            b_phik = load_tile(PHI_K, start, size, HEAD_DIM, o_n, o_d, m_d, MASKED, MASK_D)
            b_da = tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION) - b_t[:, None]
            b_da = b_da * weight
            b_dphi = tl.dot(b_da.to(b_phik.dtype), b_phik, b_dphi, input_precision=PRECISION)
    return b_dq, b_dphi


@triton.jit(do_not_specialize=LENGTHS)
def rows_kernel(
    Q, K, V, O, LSE, GRAD_O, GRAD_LSE, GRAD_Q, DELTA,
    FULL_NUM, FULL_INDEX, PART_NUM, PART_INDEX, EXTRA_NUM, EXTRA_INDEX, SKIP_NUM,
    K_SIZES, KV_LENGTHS, Q_SIZES, Q_ORDER, COVER, COLUMNS, COLUMN_NUM,
    UNREAD, CENTROID_K, CENTROID_V, PHI_K, STATE, STATE_Z, O_L, GRAD_O_L, NORM, TERM,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    q_len, k_len, n_q, n_k, n_full, n_part, n_extra, n_bytes, n_columns,
    list_b, list_h, order_h, group, q_offset, window, sink,
    scale, out_scale, per_key, n_keys,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    POSITIONAL: tl.constexpr, WINDOW: tl.constexpr, EXTRA_KEYS: tl.constexpr,
    LINEAR: tl.constexpr, FEATURE: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Write grad_q, and delta and t of the linear branch for the following kernels."""
    q_b, q_h, q_l = aligned(q_b, ALIGNED), aligned(q_h, ALIGNED), aligned(q_l, ALIGNED)
    k_b, k_h, k_l = aligned(k_b, ALIGNED), aligned(k_h, ALIGNED), aligned(k_l, ALIGNED)
    v_b, v_h, v_l = aligned(v_b, ALIGNED), aligned(v_h, ALIGNED), aligned(v_l, ALIGNED)
    SUB_Q: tl.constexpr = (BLOCK_Q + TQ - 1) // TQ
    EVEN_K: tl.constexpr = BLOCK_K % TK == 0
    MASK_D: tl.constexpr = HEAD_DIM != DP
    MASK_V: tl.constexpr = VALUE_DIM != DVP
    i_h, i_b = tl.program_id(1), tl.program_id(2)
    i_kh = i_h // group
    n_h = tl.num_programs(1)
    i_block = tl.program_id(0) // SUB_Q
    i_list = i_b * list_b + i_h * list_h
    i_row = i_list * n_q + i_block
    o_in = (tl.program_id(0) % SUB_Q) * TQ + tl.arange(0, TQ)
    o_row, m_q, m_row = query_rows(i_block, o_in, i_h, Q_SIZES, Q_ORDER, order_h, q_len, BLOCK_Q)
    o_d, o_v = tl.arange(0, DP), tl.arange(0, DVP)
    m_d, m_v = o_d < HEAD_DIM, o_v < VALUE_DIM
    i_bh = (i_b * n_h + i_h).to(tl.int64)
    Q += i_b.to(tl.int64) * q_b + i_h.to(tl.int64) * q_h
    K += i_b.to(tl.int64) * k_b + i_kh.to(tl.int64) * k_h
    V += i_b.to(tl.int64) * v_b + i_kh.to(tl.int64) * v_h
    k_end = last_key(KV_LENGTHS, i_b, k_len)
    FULL_INDEX += i_row.to(tl.int64) * n_full
    PART_INDEX += i_row.to(tl.int64) * n_part
    o_out = i_bh * q_len + o_row
    # [TQ, DP], [TQ, DVP]
    b_q = load_rows(Q, o_row, m_q, q_l, o_d, m_d, MASK_D)
    b_do = load_rows(GRAD_O + i_bh * q_len * VALUE_DIM, o_row, m_q, VALUE_DIM, o_v, m_v, MASK_V)
    b_o = load_rows(O + i_bh * q_len * VALUE_DIM, o_row, m_q, VALUE_DIM, o_v, m_v, MASK_V)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    if GRAD_LSE is not None:
        b_delta -= tl.load(GRAD_LSE + o_out, mask=m_q, other=0.0)
    tl.store(DELTA + o_out, b_delta, mask=m_row)
    b_lse = tl.load(LSE + o_out, mask=m_q, other=float("inf")) * 1.4426950408889634
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)  # rows without a key: p = 0
    b_dq = tl.zeros([TQ, DP], tl.float32)
    b_dphi = b_lse  # without a linear branch: a placeholder that the loops do not change
    b_g = None
    b_t = None
    w_read = -1.0
    w_extra = -1.0
    i_state = (i_b * (n_h // group) + i_kh).to(tl.int64)
    if LINEAR:
        b_g = load_rows(
            GRAD_O_L + i_bh * q_len * VALUE_DIM, o_row, m_q, VALUE_DIM, o_v, m_v, MASK_V
        )
        b_ol = load_rows(O_L + i_bh * q_len * VALUE_DIM, o_row, m_q, VALUE_DIM, o_v, m_v, MASK_V)
        b_t = tl.sum(b_g.to(tl.float32) * b_ol.to(tl.float32), 1)
        tl.store(TERM + o_out, b_t, mask=m_row)
        b_dphi = tl.zeros([TQ, DP], tl.float32)
        b_norm = tl.load(NORM + o_out, mask=m_q, other=0.0) * per_key
        # Totals first, while registers are free: [DP, DVP], [DP].
        p_state = STATE + i_state * HEAD_DIM * VALUE_DIM
        b_h = load_rows(p_state, o_d, m_d, VALUE_DIM, o_v, m_v, MASK_V)
        b_z = tl.load(STATE_Z + i_state * HEAD_DIM + o_d, mask=m_d, other=0.0)
        b_dphi = tl.dot(b_g, tl.trans(b_h), input_precision=PRECISION)
        b_dphi = (b_dphi - b_t[:, None] * b_z[None, :]) * n_keys
        if LINEAR == 3:
            left_out = tl.load(FULL_NUM + i_row) + tl.load(PART_NUM + i_row)
            if SKIP_NUM is not None:
                left_out += tl.load(SKIP_NUM + i_row)
            heavy = 2 * left_out >= n_k
            w_read = tl.where(heavy, 0.0, -1.0)
            w_extra = tl.where(heavy, 1.0, -1.0)
            b_dphi = tl.where(heavy, 0.0, b_dphi)
    if LINEAR == 1:
        b_x = b_q.to(tl.float32)
        b_dphi = b_dphi * b_norm[:, None]
        b_dq = phi_backward(b_x, phi(b_x, m_d, FEATURE), b_dphi, FEATURE) / out_scale
    if LINEAR >= 2:
        PHI_K += i_state * k_len * HEAD_DIM
    b_dq, b_dphi = _rows_walk(
        b_q, b_do, b_lse, b_delta, b_g, b_t, b_dq, b_dphi,
        K, V, PHI_K, FULL_INDEX, K_SIZES, tl.load(FULL_NUM + i_row),
        k_l, v_l, o_d, m_d, o_v, m_v, o_row, k_end, q_offset, window, sink, scale, w_read,
        BLOCK_K, TK, HEAD_DIM, MASK_D, MASK_V, not EVEN_K, False, WINDOW,
        True, LINEAR >= 2, PRECISION,
    )  # fmt: skip
    b_dq, b_dphi = _rows_walk(
        b_q, b_do, b_lse, b_delta, b_g, b_t, b_dq, b_dphi,
        K, V, PHI_K, PART_INDEX, K_SIZES, tl.load(PART_NUM + i_row),
        k_l, v_l, o_d, m_d, o_v, m_v, o_row, k_end, q_offset, window, sink, scale, w_read,
        BLOCK_K, TK, HEAD_DIM, MASK_D, MASK_V, True, POSITIONAL, WINDOW,
        True, LINEAR >= 2, PRECISION,
    )  # fmt: skip
    if EXTRA_NUM is not None:
        b_dq, b_dphi = _rows_walk(
            b_q, b_do, b_lse, b_delta, b_g, b_t, b_dq, b_dphi,
            K, V, PHI_K, EXTRA_INDEX + i_row.to(tl.int64) * n_extra, K_SIZES,
            tl.load(EXTRA_NUM + i_row),
            k_l, v_l, o_d, m_d, o_v, m_v, o_row, k_end, q_offset, window, sink, scale, w_extra,
            BLOCK_K, TK, HEAD_DIM, MASK_D, MASK_V, True, False, WINDOW,
            False, True, PRECISION,
        )  # fmt: skip
    if EXTRA_KEYS == 1:  # columns
        COLUMNS += i_list.to(tl.int64) * n_columns
        n_c = tl.load(COLUMN_NUM + i_row)
        for c in tl.range(0, n_c, TK):
            o_key, o_block, m_c = column_keys(
                c + tl.arange(0, TK), n_c, COLUMNS, K_SIZES, k_end, BLOCK_K
            )
            m_c = m_c & ~covered(COVER, i_row, n_bytes, o_block, m_c)
            m_s = m_c[None, :]
            if POSITIONAL:
                m_s = m_s & visible(o_row, o_key, q_offset, window, sink, WINDOW)
            # [TK, DP], [TK, DVP]
            b_k = load_rows(K, o_key, m_c, k_l, o_d, m_d, MASK_D)
            b_v = load_rows(V, o_key, m_c, v_l, o_v, m_v, MASK_V)
            b_dq = _rows_step(
                b_q, b_k, b_v, b_do, b_lse, b_delta, None, m_s, b_dq, scale,
                True, False, PRECISION,
            )  # fmt: skip
    if EXTRA_KEYS == 2:  # block means
        CENTROID_K += i_state * n_k * HEAD_DIM
        CENTROID_V += i_state * n_k * VALUE_DIM
        o_n = tl.arange(0, TK)
        for c in tl.range(0, n_k, TK):
            first = c + n_k * 0  # + n_k * 0: Triton's interpreter needs a tensor
            b_bias = mean_weights(UNREAD, i_row, first + o_n, n_k)
            # [TK, DP], [TK, DVP]
            b_k = load_tile(CENTROID_K, first, n_k - first, HEAD_DIM, o_n, o_d, m_d, True, MASK_D)
            b_v = load_tile(CENTROID_V, first, n_k - first, VALUE_DIM, o_n, o_v, m_v, True, MASK_V)
            b_dq = _rows_step(
                b_q, b_k, b_v, b_do, b_lse, b_delta, b_bias, None, b_dq, scale,
                False, True, PRECISION,
            )  # fmt: skip
    b_dq = b_dq * out_scale
    if LINEAR >= 2:
        b_x = b_q.to(tl.float32)
        b_dphi = b_dphi * b_norm[:, None]
        b_dq += phi_backward(b_x, phi(b_x, m_d, FEATURE), b_dphi, FEATURE)
    tl.store(
        GRAD_Q + o_out[:, None] * HEAD_DIM + o_d[None, :],
        b_dq.to(GRAD_Q.dtype.element_ty),
        mask=m_row[:, None] & m_d[None, :],
    )
