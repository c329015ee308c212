"""Kernels of the totals of the linear branch: phi(x)^T y and the weighted sum of phi(x), in one pass over x and y."""

import triton
import triton.language as tl

from dit_accel.kernels.tile_math import (
    LENGTHS,
    aligned,
    block_size,
    last_key,
    load_rows,
    phi,
)


@triton.jit(do_not_specialize=LENGTHS)
def state_kernel(
    X, Y, K_SIZES, KV_LENGTHS, NORM, TERM, PHI, OUT, OUT_Z,
    x_b, x_h, x_l, y_b, y_h, y_l, length, span,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, DP: tl.constexpr, TV: tl.constexpr,
    BLOCK: tl.constexpr, TL: tl.constexpr, FEATURE: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Write partial sums over `span` tokens, for TV of the value channels.

    For keys (NORM is None): sums of phi(k)^T v and phi(k) over valid keys. For queries: sums of n phi(q)^T g and
    n t phi(q), with n = NORM (0 for invalid rows) and t = TERM. `totals_kernel` adds the parts `[part, B, H, ...]` in a
    fixed order. PHI, if given, receives phi(x) `[B, H, L, D]`.
    """
    x_b, x_h, x_l = aligned(x_b, ALIGNED), aligned(x_h, ALIGNED), aligned(x_l, ALIGNED)
    y_b, y_h, y_l = aligned(y_b, ALIGNED), aligned(y_h, ALIGNED), aligned(y_l, ALIGNED)
    MASK_D: tl.constexpr = HEAD_DIM != DP
    NV: tl.constexpr = (VALUE_DIM + TV - 1) // TV
    i_h, i_b = tl.program_id(1), tl.program_id(2)
    i_part, i_v = tl.program_id(0) // NV, tl.program_id(0) % NV
    i_bh = (i_b * tl.num_programs(1) + i_h).to(tl.int64)
    o_d, o_v = tl.arange(0, DP), i_v * TV + tl.arange(0, TV)
    m_d, m_v = o_d < HEAD_DIM, o_v < VALUE_DIM
    X += i_b.to(tl.int64) * x_b + i_h.to(tl.int64) * x_h
    Y += i_b.to(tl.int64) * y_b + i_h.to(tl.int64) * y_h
    l_end = last_key(KV_LENGTHS, i_b, length)
    b_h = tl.zeros([DP, TV], tl.float32)
    b_z = tl.zeros([DP], tl.float32)
    for start in tl.range(i_part * span, tl.minimum(i_part * span + span, length), TL):
        o_l = start + tl.arange(0, TL)
        m_l = o_l < length
        # [TL, DP], [TL, TV]
        b_x = load_rows(X, o_l, m_l, x_l, o_d, m_d, MASK_D)
        b_y = load_rows(Y, o_l, m_l, y_l, o_v, m_v, True)
        # Invalid rows, which may hold NaN, are set to 0 after loading: a load whose mask is loaded too cannot be
        # prefetched.
        m_x = m_l
        if KV_LENGTHS is not None or K_SIZES is not None:
            o_block = tl.where(m_l, o_l // BLOCK, 0)
            m_x = m_l & (o_l % BLOCK < block_size(o_block, l_end, K_SIZES, BLOCK))
        if NORM is not None:
            b_n = tl.load(NORM + i_bh * length + o_l, mask=m_l, other=0.0)
            b_t = tl.load(TERM + i_bh * length + o_l, mask=m_l, other=0.0)
            m_x = m_l & (b_n != 0)
        if KV_LENGTHS is not None or K_SIZES is not None or NORM is not None:
            b_y = tl.where(m_x[:, None], b_y, 0.0)
        b_phi = tl.where(m_x[:, None], phi(b_x.to(tl.float32), m_d, FEATURE), 0.0).to(b_x.dtype)
        if PHI is not None:
            if i_v == 0:
                tl.store(
                    PHI + (i_bh * length + o_l)[:, None] * HEAD_DIM + o_d[None, :],
                    b_phi,
                    mask=(o_l < length)[:, None] & m_d[None, :],
                )
        if NORM is not None:
            b_y = (b_y.to(tl.float32) * b_n[:, None]).to(b_x.dtype)
            b_z += tl.sum(b_phi.to(tl.float32) * (b_n * b_t)[:, None], 0)
        else:
            b_z += tl.sum(b_phi.to(tl.float32), 0)
        # [DP, TV]
        b_h = tl.dot(tl.trans(b_phi), b_y, b_h, input_precision=PRECISION)
    i_out = i_part.to(tl.int64) * tl.num_programs(2) * tl.num_programs(1) + i_bh
    tl.store(
        OUT + (i_out * HEAD_DIM + o_d)[:, None] * VALUE_DIM + o_v[None, :],
        b_h,
        mask=m_d[:, None] & m_v[None, :],
    )
    if i_v == 0:
        tl.store(OUT_Z + i_out * HEAD_DIM + o_d, b_z, mask=m_d)


@triton.jit(do_not_specialize=LENGTHS)
def totals_kernel(
    PARTS, PARTS_Z, PROJ_W, STATE, STATE_Z, n_parts, group, factor,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    TD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum the parts, and the heads of a group, in a fixed order, and multiply by `factor`.

    PARTS: `[part, B, H, D, Dv]`, PARTS_Z: `[part, B, H, D]`, fp32. STATE: `[B, H / group, D, Dv]`, the sum; with PROJ_W
    `[Dv, Dv]`, the sum multiplied by its transpose. STATE_Z: `[B, H / group, D]`, fp32.
    """
    i_d, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_h = tl.num_programs(1)
    n_b = tl.num_programs(2)
    o_d, o_v = i_d * TD + tl.arange(0, TD), tl.arange(0, DVP)
    m_d, m_v = o_d < HEAD_DIM, o_v < VALUE_DIM
    b_h = tl.zeros([TD, DVP], tl.float32)
    b_z = tl.zeros([TD], tl.float32)
    for i in tl.range(0, n_parts * group):
        i_in = ((i // group * n_b + i_b) * n_h + i_h).to(tl.int64) * group + i % group
        # [TD, DVP]
        b_h += load_rows(PARTS + i_in * HEAD_DIM * VALUE_DIM, o_d, m_d, VALUE_DIM, o_v, m_v, True)
        b_z += tl.load(PARTS_Z + i_in * HEAD_DIM + o_d, mask=m_d, other=0.0)
    b_h = b_h * factor
    if PROJ_W is not None:
        p_w = PROJ_W + o_v[:, None] + o_v[None, :] * VALUE_DIM  # transposed
        b_w = tl.load(p_w, mask=m_v[:, None] & m_v[None, :], other=0.0).to(tl.float32)
        b_h = tl.dot(b_h, b_w, input_precision=PRECISION)
    i_out = (i_b * n_h + i_h).to(tl.int64) * HEAD_DIM
    tl.store(
        STATE + (i_out + o_d)[:, None] * VALUE_DIM + o_v[None, :],
        b_h.to(STATE.dtype.element_ty),
        mask=m_d[:, None] & m_v[None, :],
    )
    tl.store(STATE_Z + i_out + o_d, b_z * factor, mask=m_d)
