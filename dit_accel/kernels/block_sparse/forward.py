"""Forward kernel: exact attention over the lists of a row, its extra keys, and the linear branch.

    o = softmax(scale q k^T) v over the keys read        (README.md, equations 1 and 2)
    o_l = phi(q) H / (phi(q) . Z)                        (equation 3)

One program owns a tile of query rows of one head. Without a linear branch it may own one query block of HEADS_PACKED
query heads that have the same keys and the same lists, so that each key block is loaded once for all of them. Row r of
such a tile is row r % BLOCK_Q of head r // BLOCK_Q.

LINEAR selects the sums H and Z:

    1   the totals over all keys
    2   the totals minus the blocks that the row reads or skips, subtracted in score space
    3   by row: as 2 if the row reads and skips less than half of the blocks, else the sum over the blocks of its linear
        set. EXTRA lists the skipped blocks in the first case, the linear set in the second.

MIX selects the use of o_l:

    0   o_l is stored
    1   o += o_l, with totals that are already projected
    2   o += o_l W^T
    3   o = alpha o + (1 - alpha) o_l

With 1 to 3, only o is stored, which is enough for inference.

SPLIT: rows with very many blocks are divided into segments. Programs of segments start first, because they take longest.
They store partial results, which `merge_kernel` merges.

Loops carry the index of the next block from one step to the next. If a step loaded the index that it uses,
the compiler could not prefetch the block.
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
    query_rows,
    visible,
)


@triton.jit
def _softmax_step(
    b_q, b_k, b_v, b_bias, m_s, b_o, b_m, b_l, scale,
    MASKED: tl.constexpr, BIAS: tl.constexpr, FLIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile to the online softmax. `b_m` is the running maximum, `b_l` the running sum.

    `scale` is positive, so the maximum is taken before scaling, and scaling is part of the exponent.
    """
    # [TQ, TK]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if FLIP:
        b_s = -b_s
    if MASKED:
        b_s = tl.where(m_s, b_s, float("-inf"))
    if BIAS:
        b_s = b_s * scale + b_bias[None, :]
        b_top = tl.maximum(b_m, tl.max(b_s, 1))
    else:
        b_top = tl.maximum(b_m, tl.max(b_s, 1) * scale)
    b_base = b_top
    if MASKED or BIAS:
        b_base = tl.where(b_top == float("-inf"), 0.0, b_top)  # a row may have seen no key so far
    factor = 1.0 if BIAS else scale
    b_p = tl.exp2(b_s * factor - b_base[:, None])
    b_keep = tl.exp2(b_m - b_base)
    b_l = b_l * b_keep + tl.sum(b_p, 1)
    # [TQ, DVP]
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_keep[:, None], input_precision=PRECISION)
    return b_o, b_top, b_l


@triton.jit
def _linear_step(b_phi, b_phik, b_v, b_num, b_den, weight, PRECISION: tl.constexpr):
    """Add one tile, multiplied by `weight`, to numerator and denominator of the linear branch."""
    # [TQ, TK]
    b_a = tl.dot(b_phi, tl.trans(b_phik), input_precision=PRECISION) * weight
    b_den += tl.sum(b_a, 1)
    # [TQ, DVP]
    b_num = tl.dot(b_a.to(b_v.dtype), b_v, b_num, input_precision=PRECISION)
    return b_num, b_den


@triton.jit
def _walk(
    b_q, b_phi, b_o, b_m, b_l, b_num, b_den,
    K, V, PHI_K, INDEX, K_SIZES, first, last, is_prefix,
    k_l, v_l, o_d, m_d, o_v, m_v, q_pos, k_end, q_offset, window, sink, scale, weight,
    BLOCK_K: tl.constexpr, TK: tl.constexpr, HEAD_DIM: tl.constexpr,
    MASK_D: tl.constexpr, MASK_V: tl.constexpr, MASKED: tl.constexpr, POSITIONAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTMAX: tl.constexpr, LINEAR: tl.constexpr, FLIP: tl.constexpr,
    PREFIX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Process the blocks `first` to `last` of one list, TK keys at a time.

    With PREFIX, a row with `is_prefix` has no list and reads the blocks with these numbers.
    """
    SUB: tl.constexpr = (BLOCK_K + TK - 1) // TK
    o_n = tl.arange(0, TK)
    if PREFIX:
        i_next = tl.load(INDEX + first, mask=(first < last) & (is_prefix == 0), other=0)
        i_next += is_prefix * first
    else:
        i_next = tl.load(INDEX + first, mask=first < last, other=0)
    size_next = TK
    if MASKED and K_SIZES is not None:  # a loaded size is carried from step to step, like the index
        size_next = block_size(i_next, k_end, K_SIZES, BLOCK_K)
    for t in tl.range(first * SUB, last * SUB):
        i_k, size = i_next, size_next
        if PREFIX:
            m_next = (t + 1 < last * SUB) & (is_prefix == 0)
            i_next = tl.load(INDEX + (t + 1) // SUB, mask=m_next, other=0)
            i_next += is_prefix * ((t + 1) // SUB)
        else:
            i_next = tl.load(INDEX + (t + 1) // SUB, mask=t + 1 < last * SUB, other=0)
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
            b_o, b_m, b_l = _softmax_step(
                b_q, b_k, b_v, None, m_s, b_o, b_m, b_l, scale, MASKED, False, FLIP, PRECISION
            )
        if LINEAR:
            # [TK, DP]
            b_phik = load_tile(PHI_K, start, size, HEAD_DIM, o_n, o_d, m_d, MASKED, MASK_D)
            b_num, b_den = _linear_step(b_phi, b_phik, b_v, b_num, b_den, weight, PRECISION)
    return b_o, b_m, b_l, b_num, b_den


@triton.jit
def _linear_output(b_num, b_den, b_floor, m_q):
    """Return o_l and 1 / denominator; both are 0 where the denominator is not above `b_floor`."""
    m_l = m_q & (b_den > b_floor)
    b_inverse = tl.where(m_l, 1.0 / tl.where(m_l, b_den, 1.0), 0.0)
    return b_num * b_inverse[:, None], b_inverse


@triton.jit
def _linear_totals(
    b_phi, STATE, STATE_Z, i_state, n_keys, o_d, m_d, o_v, m_v,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, MASK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return numerator and denominator of the linear branch over all keys."""
    # [DP, DVP], [DP]
    b_z = tl.load(STATE_Z + i_state * HEAD_DIM + o_d, mask=m_d, other=0.0)
    b_den = tl.sum(b_phi.to(tl.float32) * b_z[None, :], 1) * n_keys
    p_state = STATE + i_state * HEAD_DIM * VALUE_DIM
    b_h = load_rows(p_state, o_d, m_d, VALUE_DIM, o_v, m_v, MASK_V)
    b_num = tl.dot(b_phi, b_h, input_precision=PRECISION) * n_keys
    return b_num, b_den


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    Q, K, V, O, LSE,
    FULL_NUM, FULL_INDEX, PART_NUM, PART_INDEX, EXTRA_NUM, EXTRA_INDEX, SKIP_NUM,
    K_SIZES, KV_LENGTHS, Q_SIZES, Q_ORDER, COVER, COLUMNS, COLUMN_NUM,
    UNREAD, CENTROID_K, CENTROID_V, PHI_K, STATE, STATE_Z, O_L, NORM,
    LONG_ROWS, IS_LONG, PART_O, PART_LSE,
    PROJ_W, PROJ_B, ALPHA, FILLED,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, alpha_b, alpha_h, alpha_q,
    q_len, k_len, n_q, n_k, n_full, n_part, n_extra, n_bytes, n_columns,
    list_b, list_h, list_group, order_h, group, q_offset, window, sink,
    scale, n_keys, long_blocks, n_long, n_segments,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    POSITIONAL: tl.constexpr, WINDOW: tl.constexpr, EXTRA_KEYS: tl.constexpr,
    LINEAR: tl.constexpr, FEATURE: tl.constexpr, MIX: tl.constexpr, SPLIT: tl.constexpr,
    PREFIX: tl.constexpr, WANT_LSE: tl.constexpr, FLIP: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    HEADS_PACKED: tl.constexpr,
):  # fmt: skip
    q_b, q_h, q_l = aligned(q_b, ALIGNED), aligned(q_h, ALIGNED), aligned(q_l, ALIGNED)
    k_b, k_h, k_l = aligned(k_b, ALIGNED), aligned(k_h, ALIGNED), aligned(k_l, ALIGNED)
    v_b, v_h, v_l = aligned(v_b, ALIGNED), aligned(v_h, ALIGNED), aligned(v_l, ALIGNED)
    SUB_Q: tl.constexpr = (BLOCK_Q + TQ - 1) // TQ
    EVEN_K: tl.constexpr = BLOCK_K % TK == 0
    MASK_D: tl.constexpr = HEAD_DIM != DP
    MASK_V: tl.constexpr = VALUE_DIM != DVP
    i_h, i_b = tl.program_id(1) * HEADS_PACKED, tl.program_id(2)  # with packed heads: the first one
    i_kh, i_lh = i_h // group, i_h // list_group
    n_h = tl.num_programs(1) * HEADS_PACKED
    i_sub = tl.program_id(0) % SUB_Q
    i_block = tl.program_id(0) // SUB_Q
    if SPLIT:
        is_segment = i_block < n_segments * n_long
        i_slot = i_block % n_long
        i_segment = tl.where(is_segment, i_block // n_long, 0)
        i_long = tl.load(LONG_ROWS + i_slot, mask=is_segment, other=0)
        i_block = tl.where(is_segment, i_long, i_block - n_segments * n_long)
    i_list = i_b * list_b + i_lh * list_h
    i_row = i_list * n_q + i_block
    full = tl.load(FULL_NUM + i_row)
    part = tl.load(PART_NUM + i_row)
    first, last = 0, full + part
    if SPLIT:
        is_long = (full + part > long_blocks) & (tl.load(IS_LONG + i_block) != 0)
        if is_long != is_segment:
            return  # programs of segments compute this row
        last = tl.where(is_segment, tl.minimum((i_segment + 1) * long_blocks, last), last)
        first = tl.minimum(i_segment * long_blocks, last)

    o_in = i_sub * TQ + tl.arange(0, TQ)
    if HEADS_PACKED > 1:
        # Rows after the last head are assigned to the last head, past its query block, where no row exists.
        o_head = tl.minimum(o_in // BLOCK_Q, HEADS_PACKED - 1)
        o_in -= o_head * BLOCK_Q
    o_row, m_q, m_row = query_rows(i_block, o_in, i_lh, Q_SIZES, Q_ORDER, order_h, q_len, BLOCK_Q)
    o_d, o_v = tl.arange(0, DP), tl.arange(0, DVP)
    m_d, m_v = o_d < HEAD_DIM, o_v < VALUE_DIM
    k_end = last_key(KV_LENGTHS, i_b, k_len)
    Q += i_b.to(tl.int64) * q_b + i_h.to(tl.int64) * q_h
    if HEADS_PACKED > 1:
        Q += (o_head.to(tl.int64) * q_h)[:, None]
    K += i_b.to(tl.int64) * k_b + i_kh.to(tl.int64) * k_h
    V += i_b.to(tl.int64) * v_b + i_kh.to(tl.int64) * v_h
    FULL_INDEX += i_row.to(tl.int64) * n_full
    PART_INDEX += i_row.to(tl.int64) * n_part
    # [TQ, DP]
    b_q = load_rows(Q, o_row, m_q, q_l, o_d, m_d, MASK_D)
    b_o = tl.zeros([TQ, DVP], tl.float32)
    b_m = tl.full([TQ], float("-inf"), tl.float32)
    b_l = tl.zeros([TQ], tl.float32)
    i_bh = (i_b * n_h + i_h).to(tl.int64)
    i_state = (i_b * (n_h // group) + i_kh).to(tl.int64)
    b_phi = None
    b_num, b_den = b_l, b_l  # without a linear branch: placeholders that the loops do not change
    b_floor = tl.zeros([TQ], tl.float32) + 1e-30
    w_read = -1.0
    w_extra = -1.0
    if LINEAR and not (LINEAR == 1 and MIX):  # totals first, while registers are free
        b_phi = phi(b_q.to(tl.float32), m_d, FEATURE).to(b_q.dtype)
        b_num, b_den = _linear_totals(
            b_phi, STATE, STATE_Z, i_state, n_keys, o_d, m_d, o_v, m_v,
            HEAD_DIM, VALUE_DIM, MASK_V, PRECISION,
        )  # fmt: skip
        if LINEAR == 1:
            b_ol, b_inverse = _linear_output(b_num, b_den + 1e-5, b_floor, m_q)
            p_l = O_L + i_bh * q_len * VALUE_DIM + o_row.to(tl.int64)[:, None] * VALUE_DIM
            tl.store(
                p_l + o_v[None, :],
                b_ol.to(O_L.dtype.element_ty),
                mask=m_row[:, None] & m_v[None, :],
            )
            tl.store(NORM + i_bh * q_len + o_row, b_inverse * n_keys, mask=m_row)
        else:
            PHI_K += i_state * k_len * HEAD_DIM
            if LINEAR == 3:
                left_out = full + part
                if SKIP_NUM is not None:
                    left_out += tl.load(SKIP_NUM + i_row)
                heavy = 2 * left_out >= n_k
                w_read = tl.where(heavy, 0.0, -1.0)
                w_extra = tl.where(heavy, 1.0, -1.0)
                b_num = tl.where(heavy, 0.0, b_num)
                b_den = tl.where(heavy, 0.0, b_den)
            # A rest below the rounding error of the subtraction counts as 0.
            b_floor += b_den * 4e-6

    if MIX == 3:
        filled = (k_end + BLOCK_K - 1) // BLOCK_K
        if FILLED is not None:
            filled = tl.load(FILLED + i_b)
        left_out = full + part
        if LINEAR == 1:
            left_out = 0
        elif SKIP_NUM is not None:
            left_out += tl.load(SKIP_NUM + i_row)
        alpha = tl.load(ALPHA + i_b * alpha_b + i_h * alpha_h + i_block * alpha_q).to(tl.float32)
        alpha = tl.where(left_out >= filled, 1.0, alpha)  # the linear set is empty

    b_o, b_m, b_l, b_num, b_den = _walk(
        b_q, b_phi, b_o, b_m, b_l, b_num, b_den,
        K, V, PHI_K, FULL_INDEX, K_SIZES, tl.minimum(first, full), tl.minimum(last, full),
        (full > n_full).to(tl.int32),
        k_l, v_l, o_d, m_d, o_v, m_v, o_row, k_end, q_offset, window, sink, scale, w_read,
        BLOCK_K, TK, HEAD_DIM, MASK_D, MASK_V, not EVEN_K, False, WINDOW,
        True, LINEAR >= 2, FLIP, PREFIX, PRECISION,
    )  # fmt: skip
    b_o, b_m, b_l, b_num, b_den = _walk(
        b_q, b_phi, b_o, b_m, b_l, b_num, b_den,
        K, V, PHI_K, PART_INDEX, K_SIZES, tl.maximum(first - full, 0), tl.maximum(last - full, 0), 0,
        k_l, v_l, o_d, m_d, o_v, m_v, o_row, k_end, q_offset, window, sink, scale, w_read,
        BLOCK_K, TK, HEAD_DIM, MASK_D, MASK_V, True, POSITIONAL, WINDOW,
        True, LINEAR >= 2, FLIP, False, PRECISION,
    )  # fmt: skip
    if EXTRA_NUM is not None:
        EXTRA_INDEX += i_row.to(tl.int64) * n_extra
        b_o, b_m, b_l, b_num, b_den = _walk(
            b_q, b_phi, b_o, b_m, b_l, b_num, b_den,
            K, V, PHI_K, EXTRA_INDEX, K_SIZES, 0, tl.load(EXTRA_NUM + i_row), 0,
            k_l, v_l, o_d, m_d, o_v, m_v, o_row, k_end, q_offset, window, sink, scale, w_extra,
            BLOCK_K, TK, HEAD_DIM, MASK_D, MASK_V, True, False, WINDOW,
            False, True, FLIP, False, PRECISION,
        )  # fmt: skip
    if EXTRA_KEYS == 1:  # columns
        COLUMNS += i_list.to(tl.int64) * n_columns
        n_c = tl.load(COLUMN_NUM + i_row)
        if SPLIT:
            n_c = tl.where(i_segment == 0, n_c, 0)
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
            b_o, b_m, b_l = _softmax_step(
                b_q, b_k, b_v, None, m_s, b_o, b_m, b_l, scale, True, False, FLIP, PRECISION
            )
    if EXTRA_KEYS == 2:  # block means
        CENTROID_K += i_state * n_k * HEAD_DIM
        CENTROID_V += i_state * n_k * VALUE_DIM
        o_n = tl.arange(0, TK)
        for c in tl.range(0, n_k, TK):
            start = c + n_k * 0  # + n_k * 0: Triton's interpreter needs a tensor
            b_bias = mean_weights(UNREAD, i_row, start + o_n, n_k)
            # [TK, DP], [TK, DVP]
            b_k = load_tile(CENTROID_K, start, n_k - start, HEAD_DIM, o_n, o_d, m_d, True, MASK_D)
            b_v = load_tile(CENTROID_V, start, n_k - start, VALUE_DIM, o_n, o_v, m_v, True, MASK_V)
            b_o, b_m, b_l = _softmax_step(
                b_q, b_k, b_v, b_bias, None, b_o, b_m, b_l, scale, False, True, FLIP, PRECISION
            )

    m_out = b_l > 0
    if Q_SIZES is not None:
        m_out = m_out & m_q
    b_l = tl.where(m_out, b_l, 1.0)
    b_o = tl.where(m_out[:, None], b_o / b_l[:, None], 0.0)
    if LINEAR >= 2:
        b_ol, b_inverse = _linear_output(b_num, b_den, b_floor, m_q)
    if MIX == 1 or (MIX == 3 and LINEAR == 1):
        # Recomputed here: kept through the loops, both would occupy registers.
        first_row = i_block * BLOCK_Q
        Q += first_row.to(tl.int64) * q_l
        b_q = load_rows(Q, o_row - first_row, m_q, q_l, o_d, m_d, MASK_D)
        b_phi = phi(b_q.to(tl.float32), m_d, FEATURE)
        b_num, b_den = _linear_totals(
            b_phi.to(b_q.dtype), STATE, STATE_Z, i_state, n_keys, o_d, m_d, o_v, m_v,
            HEAD_DIM, VALUE_DIM, MASK_V, PRECISION,
        )  # fmt: skip
        b_ol, b_inverse = _linear_output(b_num, b_den + 1e-5, b_floor, m_q)
    if MIX == 1:
        b_o += b_ol
    elif MIX == 2:
        p_w = PROJ_W + o_v[:, None] + o_v[None, :] * VALUE_DIM  # transposed
        b_w = tl.load(p_w, mask=m_v[:, None] & m_v[None, :], other=0.0)
        b_o = tl.dot(b_ol.to(b_q.dtype), b_w, b_o, input_precision=PRECISION)
    elif MIX == 3:
        b_o = b_ol + alpha * (b_o - b_ol)
    if PROJ_B is not None:
        b_o += tl.load(PROJ_B + o_v, mask=m_v, other=0.0).to(tl.float32)[None, :]
    if WANT_LSE or SPLIT:
        b_lse = tl.where(
            m_out, (tl.where(m_out, b_m, 0.0) + tl.log2(b_l)) * 0.6931471805599453, float("-inf")
        )
    if SPLIT:
        if is_segment:  # partial results: [segment, B, H, n_long * BLOCK_Q]
            i_part = (i_segment.to(tl.int64) * tl.num_programs(2) + i_b) * n_h + i_h
            o_part = (i_part * n_long + i_slot) * BLOCK_Q + o_in
            m_part = o_in < BLOCK_Q
            if HEADS_PACKED > 1:
                o_part += o_head * (n_long * BLOCK_Q)
            tl.store(
                PART_O + o_part[:, None] * VALUE_DIM + o_v[None, :],
                b_o,
                mask=m_part[:, None] & m_v[None, :],
            )
            tl.store(PART_LSE + o_part, b_lse, mask=m_part)
            return
    if HEADS_PACKED > 1:
        o_row += o_head * q_len
    O += i_bh * q_len * VALUE_DIM  # o_out * VALUE_DIM would occupy registers in the loops
    o_out = i_bh * q_len + o_row
    tl.store(
        O + o_row.to(tl.int64)[:, None] * VALUE_DIM + o_v[None, :],
        b_o.to(O.dtype.element_ty),
        mask=m_row[:, None] & m_v[None, :],
    )
    if WANT_LSE:
        tl.store(LSE + o_out, b_lse, mask=m_row)
    if LINEAR >= 2 and not MIX:
        tl.store(NORM + o_out, b_inverse * n_keys, mask=m_row)
        tl.store(
            O_L + o_out[:, None] * VALUE_DIM + o_v[None, :],
            b_ol.to(O_L.dtype.element_ty),
            mask=m_row[:, None] & m_v[None, :],
        )


@triton.jit(do_not_specialize=LENGTHS)
def merge_kernel(
    PART_O, PART_LSE, O, LSE, FULL_NUM, PART_NUM, LONG_ROWS, Q_SIZES, Q_ORDER,
    q_len, n_q, list_b, list_h, list_group, order_h, long_blocks, n_long, n_segments,
    VALUE_DIM: tl.constexpr, DVP: tl.constexpr, BLOCK_Q: tl.constexpr, TQ: tl.constexpr,
    WANT_LSE: tl.constexpr,
):  # fmt: skip
    """Merge the segments of a long row by their lse, and write the result to the row."""
    SUB_Q: tl.constexpr = (BLOCK_Q + TQ - 1) // TQ
    i_slot = tl.program_id(0) // SUB_Q
    i_h, i_b = tl.program_id(1), tl.program_id(2)
    i_lh = i_h // list_group
    n_h = tl.num_programs(1)
    i_block = tl.load(LONG_ROWS + i_slot)
    i_row = (i_b * list_b + i_lh * list_h) * n_q + i_block
    if tl.load(FULL_NUM + i_row) + tl.load(PART_NUM + i_row) <= long_blocks:
        return
    o_in = (tl.program_id(0) % SUB_Q) * TQ + tl.arange(0, TQ)
    o_row, _, m_row = query_rows(i_block, o_in, i_lh, Q_SIZES, Q_ORDER, order_h, q_len, BLOCK_Q)
    o_v = tl.arange(0, DVP)
    m_v = o_v < VALUE_DIM
    m_in = o_in < BLOCK_Q
    b_o = tl.zeros([TQ, DVP], tl.float32)
    b_m = tl.full([TQ], float("-inf"), tl.float32)
    b_l = tl.zeros([TQ], tl.float32)
    for s in tl.range(0, n_segments):
        i_bh = s * tl.num_programs(2) * n_h + i_b * n_h + i_h
        o_part = (i_bh.to(tl.int64) * n_long + i_slot) * BLOCK_Q + o_in
        b_lse = tl.load(PART_LSE + o_part, mask=m_in, other=float("-inf"))
        b_top = tl.maximum(b_m, b_lse)
        b_base = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_keep = tl.exp2((b_m - b_base) * 1.4426950408889634)
        b_w = tl.exp2((b_lse - b_base) * 1.4426950408889634)
        # [TQ, DVP]
        b_x = load_rows(PART_O, o_part, m_in, VALUE_DIM, o_v, m_v, True)
        b_o = b_o * b_keep[:, None] + b_x * b_w[:, None]
        b_l = b_l * b_keep + b_w
        b_m = b_top
    m_out = b_l > 0
    b_l = tl.where(m_out, b_l, 1.0)
    o_out = (i_b * n_h + i_h).to(tl.int64) * q_len + o_row
    tl.store(
        O + o_out[:, None] * VALUE_DIM + o_v[None, :],
        tl.where(m_out[:, None], b_o / b_l[:, None], 0.0).to(O.dtype.element_ty),
        mask=m_row[:, None] & m_v[None, :],
    )
    if WANT_LSE:
        b_lse = tl.where(
            m_out, tl.where(m_out, b_m, 0.0) + tl.log2(b_l) * 0.6931471805599453, float("-inf")
        )
        tl.store(LSE + o_out, b_lse, mask=m_row)
