"""Backward kernels of the key side: one program owns a key tile and reads the transposed lists of its block.

    dk = scale ds^T q   dv = p^T dO                                (README.md, equation 4)

The cost is proportional to the number of blocks that are read. The linear branch has a separate launch
(linear/columns_kernel.py), because both together need more registers than a thread has.
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
    query_rows,
    query_size,
    sized_rows,
    visible,
)


@triton.jit
def _columns_step(
    b_k, b_v, b_q, b_do, b_lse, b_delta, b_bias, m_s, b_dk, b_dv, scale,
    MASKED: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the contribution of one query tile to grad_k and grad_v. Tiles are transposed, [TK, TQ]."""
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale
    if BIAS:
        b_s += b_bias[:, None]
    b_p = tl.exp2(b_s - b_lse[None, :])
    if MASKED:
        b_p = tl.where(m_s, b_p, 0.0)
    # [TK, DVP]
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[None, :])
    # [TK, DP]
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit
def _columns_walk(
    b_k, b_v, b_dk, b_dv, Q, GRAD_O, LSE, DELTA, INDEX, count, i_h,
    Q_SIZES, Q_ORDER, order_h, q_len, q_l, o_d, m_d, o_v, m_v, k_pos,
    q_offset, window, sink, scale,
    BLOCK_Q: tl.constexpr, TQ: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    MASK_D: tl.constexpr, MASK_V: tl.constexpr, POSITIONAL: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Process the query blocks of one transposed list, TQ rows at a time."""
    SUB: tl.constexpr = (BLOCK_Q + TQ - 1) // TQ
    i_next = tl.load(INDEX, mask=count > 0, other=0)
    size_next = query_size(i_next, Q_SIZES, BLOCK_Q)
    for t in tl.range(0, count * SUB):
        i_block, size = i_next, size_next
        i_next = tl.load(INDEX + (t + 1) // SUB, mask=t + 1 < count * SUB, other=0)
        size_next = query_size(i_next, Q_SIZES, BLOCK_Q)
        o_in = (t % SUB) * TQ + tl.arange(0, TQ)
        o_row, m_q, _ = sized_rows(i_block, size, o_in, i_h, Q_ORDER, order_h, q_len, BLOCK_Q)
        # [TQ, DP], [TQ, DVP]
        b_q = load_rows(Q, o_row, m_q, q_l, o_d, m_d, MASK_D)
        b_do = load_rows(GRAD_O, o_row, m_q, VALUE_DIM, o_v, m_v, MASK_V)
        b_lse = tl.load(LSE + o_row, mask=m_q, other=float("inf")) * 1.4426950408889634
        b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
        b_delta = tl.load(DELTA + o_row, mask=m_q, other=0.0)
        m_s = None
        if POSITIONAL:
            m_s = tl.trans(visible(o_row, k_pos, q_offset, window, sink, WINDOW))
        b_dk, b_dv = _columns_step(
            b_k, b_v, b_q, b_do, b_lse, b_delta, None, m_s, b_dk, b_dv, scale,
            POSITIONAL, False, PRECISION,
        )  # fmt: skip
    return b_dk, b_dv


@triton.jit(do_not_specialize=LENGTHS)
def columns_kernel(
    Q, K, V, LSE, GRAD_O, DELTA, GRAD_K, GRAD_V,
    FULL_NUM, FULL_INDEX, PART_NUM, PART_INDEX,
    K_SIZES, KV_LENGTHS, Q_SIZES, Q_ORDER, GRAD_CENTROID_K, GRAD_CENTROID_V,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    q_len, k_len, n_k, n_full, n_part,
    list_b, list_h, order_h, group, q_offset, window, sink,
    scale, out_scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    POSITIONAL: tl.constexpr, WINDOW: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Write grad_k and grad_v of one key tile. ADD: add to the gradients of the linear branch in memory."""
    q_b, q_h, q_l = aligned(q_b, ALIGNED), aligned(q_h, ALIGNED), aligned(q_l, ALIGNED)
    k_b, k_h, k_l = aligned(k_b, ALIGNED), aligned(k_h, ALIGNED), aligned(k_l, ALIGNED)
    v_b, v_h, v_l = aligned(v_b, ALIGNED), aligned(v_h, ALIGNED), aligned(v_l, ALIGNED)
    SUB_K: tl.constexpr = (BLOCK_K + TK - 1) // TK
    MASK_D: tl.constexpr = HEAD_DIM != DP
    MASK_V: tl.constexpr = VALUE_DIM != DVP
    i_kh, i_b = tl.program_id(1), tl.program_id(2)
    n_kh = tl.num_programs(1)
    i_block = tl.program_id(0) // SUB_K
    o_in = (tl.program_id(0) % SUB_K) * TK + tl.arange(0, TK)
    o_key = i_block * BLOCK_K + o_in
    size = block_size(i_block, last_key(KV_LENGTHS, i_b, k_len), K_SIZES, BLOCK_K)
    m_k = o_in < size
    m_row = (o_in < BLOCK_K) & (o_key < k_len)
    o_d, o_v = tl.arange(0, DP), tl.arange(0, DVP)
    m_d, m_v = o_d < HEAD_DIM, o_v < VALUE_DIM
    i_bk = (i_b * n_kh + i_kh).to(tl.int64)
    K += i_b.to(tl.int64) * k_b + i_kh.to(tl.int64) * k_h
    V += i_b.to(tl.int64) * v_b + i_kh.to(tl.int64) * v_h
    # [TK, DP], [TK, DVP]
    b_k = load_rows(K, o_key, m_k, k_l, o_d, m_d, MASK_D)
    b_v = load_rows(V, o_key, m_k, v_l, o_v, m_v, MASK_V)
    b_dk = tl.zeros([TK, DP], tl.float32)
    b_dv = tl.zeros([TK, DVP], tl.float32)
    for g in range(0, group):
        i_h = i_kh * group + g
        i_bh = (i_b * n_kh * group + i_h).to(tl.int64)
        i_row = (i_b * list_b + i_h * list_h) * n_k + i_block
        p_q = Q + i_b.to(tl.int64) * q_b + i_h.to(tl.int64) * q_h
        p_do = GRAD_O + i_bh * q_len * VALUE_DIM
        b_dk, b_dv = _columns_walk(
            b_k, b_v, b_dk, b_dv, p_q, p_do, LSE + i_bh * q_len, DELTA + i_bh * q_len,
            FULL_INDEX + i_row.to(tl.int64) * n_full, tl.load(FULL_NUM + i_row), i_h,
            Q_SIZES, Q_ORDER, order_h, q_len, q_l, o_d, m_d, o_v, m_v, o_key,
            q_offset, window, sink, scale,
            BLOCK_Q, TQ, HEAD_DIM, VALUE_DIM, MASK_D, MASK_V, False, WINDOW, PRECISION,
        )  # fmt: skip
        if (
            PART_NUM is not None
        ):  # only positions need an element mask here: padding keys are masked once per tile
            b_dk, b_dv = _columns_walk(
                b_k, b_v, b_dk, b_dv, p_q, p_do, LSE + i_bh * q_len, DELTA + i_bh * q_len,
                PART_INDEX + i_row.to(tl.int64) * n_part, tl.load(PART_NUM + i_row), i_h,
                Q_SIZES, Q_ORDER, order_h, q_len, q_l, o_d, m_d, o_v, m_v, o_key,
                q_offset, window, sink, scale,
                BLOCK_Q, TQ, HEAD_DIM, VALUE_DIM, MASK_D, MASK_V, POSITIONAL, WINDOW, PRECISION,
            )  # fmt: skip
    b_dk = b_dk * out_scale
    if GRAD_CENTROID_K is not None:  # a mean passes its gradient to its tokens in equal parts
        i_c = i_bk * n_k + i_block
        b_share = 1.0 / tl.maximum(size, 1)
        b_ck = tl.load(GRAD_CENTROID_K + i_c * HEAD_DIM + o_d, mask=m_d, other=0.0)
        b_cv = tl.load(GRAD_CENTROID_V + i_c * VALUE_DIM + o_v, mask=m_v, other=0.0)
        b_dk += (b_ck * b_share)[None, :]
        b_dv += (b_cv * b_share)[None, :]
    o_out = i_bk * k_len + o_key
    p_k = GRAD_K + o_out[:, None] * HEAD_DIM + o_d[None, :]
    p_v = GRAD_V + o_out[:, None] * VALUE_DIM + o_v[None, :]
    b_dk = tl.where(m_k[:, None], b_dk, 0.0)
    b_dv = tl.where(m_k[:, None], b_dv, 0.0)
    if ADD:
        b_dk += tl.load(p_k, mask=m_row[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        b_dv += tl.load(p_v, mask=m_row[:, None] & m_v[None, :], other=0.0).to(tl.float32)
    tl.store(p_k, b_dk.to(GRAD_K.dtype.element_ty), mask=m_row[:, None] & m_d[None, :])
    tl.store(p_v, b_dv.to(GRAD_V.dtype.element_ty), mask=m_row[:, None] & m_v[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def gathered_kernel(
    Q, K, V, LSE, GRAD_O, DELTA, GRAD_X_K, GRAD_X_V,
    K_SIZES, KV_LENGTHS, Q_SIZES, Q_ORDER, COVER, COLUMNS, UNREAD, CENTROID_K, CENTROID_V,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    q_len, k_len, n_q, n_k, n_bytes, n_columns, span,
    list_b, list_h, order_h, group, q_offset, window, sink, scale, out_scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    POSITIONAL: tl.constexpr, WINDOW: tl.constexpr, EXTRA_KEYS: tl.constexpr,
    PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Write gradients of the extra keys (columns, or block means) of one head, summed over `span` query blocks.

    The results of all parts are [part, B, Hq, n, D] in fp32. The caller sums them in a fixed order.
    """
    q_b, q_h, q_l = aligned(q_b, ALIGNED), aligned(q_h, ALIGNED), aligned(q_l, ALIGNED)
    k_b, k_h, k_l = aligned(k_b, ALIGNED), aligned(k_h, ALIGNED), aligned(k_l, ALIGNED)
    v_b, v_h, v_l = aligned(v_b, ALIGNED), aligned(v_h, ALIGNED), aligned(v_l, ALIGNED)
    SUB_Q: tl.constexpr = (BLOCK_Q + TQ - 1) // TQ
    MASK_D: tl.constexpr = HEAD_DIM != DP
    MASK_V: tl.constexpr = VALUE_DIM != DVP
    n_h = tl.num_programs(1)
    n_parts = (n_q + span - 1) // span
    i_part = tl.program_id(0) % n_parts
    i_h, i_b = tl.program_id(1), tl.program_id(2)
    i_kh = i_h // group
    i_list = i_b * list_b + i_h * list_h
    o_c = (tl.program_id(0) // n_parts) * TK + tl.arange(0, TK)
    o_d, o_v = tl.arange(0, DP), tl.arange(0, DVP)
    m_d, m_v = o_d < HEAD_DIM, o_v < VALUE_DIM
    i_bh = (i_b * n_h + i_h).to(tl.int64)
    if EXTRA_KEYS == 2:  # block means
        i_c = (i_b * (n_h // group) + i_kh).to(tl.int64) * n_k
        first = (tl.program_id(0) // n_parts) * TK
        o_n = tl.arange(0, TK)
        n_c = n_k
        # [TK, DP], [TK, DVP]
        b_k = load_tile(
            CENTROID_K + i_c * HEAD_DIM, first, n_k - first, HEAD_DIM, o_n, o_d, m_d, True, MASK_D
        )
        b_v = load_tile(
            CENTROID_V + i_c * VALUE_DIM, first, n_k - first, VALUE_DIM, o_n, o_v, m_v, True, MASK_V
        )
    else:
        n_c = n_columns
        k_end = last_key(KV_LENGTHS, i_b, k_len)
        o_key, o_block, m_c = column_keys(
            o_c, n_c, COLUMNS + i_list.to(tl.int64) * n_columns, K_SIZES, k_end, BLOCK_K
        )
        # [TK, DP], [TK, DVP]
        p_k = K + i_b.to(tl.int64) * k_b + i_kh.to(tl.int64) * k_h
        p_v = V + i_b.to(tl.int64) * v_b + i_kh.to(tl.int64) * v_h
        b_k = load_rows(p_k, o_key, m_c, k_l, o_d, m_d, MASK_D)
        b_v = load_rows(p_v, o_key, m_c, v_l, o_v, m_v, MASK_V)
    b_dk = tl.zeros([TK, DP], tl.float32)
    b_dv = tl.zeros([TK, DVP], tl.float32)
    Q += i_b.to(tl.int64) * q_b + i_h.to(tl.int64) * q_h
    GRAD_O += i_bh * q_len * VALUE_DIM
    LSE += i_bh * q_len
    DELTA += i_bh * q_len
    first = i_part * span
    for t in tl.range(first * SUB_Q, tl.minimum(first + span, n_q) * SUB_Q):
        i_block = t // SUB_Q
        o_in = (t % SUB_Q) * TQ + tl.arange(0, TQ)
        o_row, m_q, _ = query_rows(i_block, o_in, i_h, Q_SIZES, Q_ORDER, order_h, q_len, BLOCK_Q)
        b_bias, m_s = None, None
        if EXTRA_KEYS == 2:
            b_bias = mean_weights(UNREAD, i_list * n_q + i_block, o_c, n_k)
        else:
            m_x = m_c & ~covered(COVER, i_list * n_q + i_block, n_bytes, o_block, m_c)
            m_s = m_x[:, None]
            if POSITIONAL:
                m_s = m_s & tl.trans(visible(o_row, o_key, q_offset, window, sink, WINDOW))
        # [TQ, DP], [TQ, DVP]
        b_q = load_rows(Q, o_row, m_q, q_l, o_d, m_d, MASK_D)
        b_do = load_rows(GRAD_O, o_row, m_q, VALUE_DIM, o_v, m_v, MASK_V)
        b_lse = tl.load(LSE + o_row, mask=m_q, other=float("inf")) * 1.4426950408889634
        b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
        b_delta = tl.load(DELTA + o_row, mask=m_q, other=0.0)
        b_dk, b_dv = _columns_step(
            b_k, b_v, b_q, b_do, b_lse, b_delta, b_bias, m_s, b_dk, b_dv, scale,
            EXTRA_KEYS == 1, EXTRA_KEYS == 2, PRECISION,
        )  # fmt: skip
    o_out = ((i_part.to(tl.int64) * tl.num_programs(2) + i_b) * n_h + i_h) * n_c + o_c
    m_out = o_c < n_c
    tl.store(
        GRAD_X_K + o_out[:, None] * HEAD_DIM + o_d[None, :],
        b_dk * out_scale,
        mask=m_out[:, None] & m_d[None, :],
    )
    tl.store(
        GRAD_X_V + o_out[:, None] * VALUE_DIM + o_v[None, :],
        b_dv,
        mask=m_out[:, None] & m_v[None, :],
    )
