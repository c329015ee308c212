"""Operations on one tile that the Triton kernels share.

Name prefixes: `i_` program index, `o_` offsets, `m_` mask, `p_` pointers, `b_` block in registers. The tile is TQ x TK.
Scores are in base 2 (`scale` includes log2 e). Addresses are 64 bit.
"""

import triton
import triton.language as tl

# Lengths and counts change from call to call. Kernels are not compiled again for each value.
LENGTHS = (
    "q_len", "k_len", "n_q", "n_k", "n_full", "n_part", "n_extra", "n_bytes", "n_columns", "n_row",
    "order_h", "long_blocks", "n_long", "n_segments", "length", "span", "n_parts",
)  # fmt: skip


@triton.jit
def aligned(stride, ALIGNED: tl.constexpr):
    """Return the stride as a multiple of 8 for the compiler, which rows of 72 need for asynchronous copies."""
    return stride // 8 * 8 if ALIGNED else stride


@triton.jit
def phi(b_x, m_d, FEATURE: tl.constexpr):
    """Return the feature map of rows `[N, DP]` in fp32, 0 beyond head_dim. FEATURE: 0 softmax, 1 elu + 1, 2 relu."""
    if FEATURE == 0:
        b_x = tl.where(m_d[None, :], b_x, float("-inf"))
        b_e = tl.exp2((b_x - tl.max(b_x, 1)[:, None]) * 1.4426950408889634)
        b_y = b_e / tl.sum(b_e, 1)[:, None]
    elif FEATURE == 1:
        b_y = tl.where(b_x > 0, b_x + 1.0, tl.exp2(tl.minimum(b_x, 0.0) * 1.4426950408889634))
    else:
        b_y = tl.maximum(b_x, 0.0)
    return tl.where(m_d[None, :], b_y, 0.0)


@triton.jit
def phi_backward(b_x, b_phi, b_dphi, FEATURE: tl.constexpr):
    """Return the gradient of x `[N, DP]`, given phi(x) and the gradient of phi(x), all fp32."""
    if FEATURE == 0:
        return b_phi * (b_dphi - tl.sum(b_dphi * b_phi, 1)[:, None])
    elif FEATURE == 1:
        return b_dphi * tl.where(b_x > 0, 1.0, b_phi)
    else:
        return tl.where(b_x > 0, b_dphi, 0.0)


@triton.jit
def visible(q_pos, k_pos, q_offset, window, sink, WINDOW: tl.constexpr):
    """Return the mask of visible pairs under the causal, window and sink rules, `[TQ, TK]`."""
    last = q_pos[:, None] + q_offset
    m_s = k_pos[None, :] <= last
    if WINDOW:
        m_s = m_s & ((k_pos[None, :] > last - window) | (k_pos[None, :] < sink))
    return m_s


@triton.jit
def query_rows(i_block, o_in, i_h, Q_SIZES, Q_ORDER, order_h, q_len, BLOCK_Q: tl.constexpr):
    """Return the positions of the rows of a query tile, the mask of queries, and the mask of existing rows.

    A row beyond the size of a ragged block exists (its output is 0, its lse -inf) but is no query.
    """
    size = query_size(i_block, Q_SIZES, BLOCK_Q)
    return sized_rows(i_block, size, o_in, i_h, Q_ORDER, order_h, q_len, BLOCK_Q)


@triton.jit
def query_size(i_block, Q_SIZES, BLOCK_Q: tl.constexpr):
    """Return the number of valid queries of a query block. Loops over lists carry it from step to step, like the index."""
    size = BLOCK_Q
    if Q_SIZES is not None:
        size = tl.load(Q_SIZES + i_block)
    return size


@triton.jit
def sized_rows(i_block, size, o_in, i_h, Q_ORDER, order_h, q_len, BLOCK_Q: tl.constexpr):
    """Return the results of `query_rows` for a block whose number of queries is known."""
    o_row = i_block * BLOCK_Q + o_in
    m_row = (o_in < BLOCK_Q) & (o_row < q_len)
    m_q = m_row & (o_in < size)
    if Q_ORDER is not None:
        o_row = tl.load(Q_ORDER + i_h * order_h + o_row, mask=m_row, other=0)
    return o_row, m_q, m_row


@triton.jit
def load_rows(X, o_row, m_row, stride, o_d, m_d, MASK_D: tl.constexpr):
    """Load rows `[N, DP]` at 64-bit addresses; 0 where masked."""
    p_x = X + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    if MASK_D:
        return tl.load(p_x, mask=m_row[:, None] & m_d[None, :], other=0.0)
    return tl.load(p_x, mask=m_row[:, None], other=0.0)


@triton.jit
def load_tile(X, start, size, stride, o_n, o_d, m_d, MASKED: tl.constexpr, MASK_D: tl.constexpr):
    """Load rows `[N, DP]` from row `start` on. MASKED: only the first `size` rows; the rest is 0."""
    p_x = X + start.to(tl.int64) * stride + o_n[:, None] * stride + o_d[None, :]
    if MASKED and MASK_D:
        return tl.load(p_x, mask=(o_n[:, None] < size) & m_d[None, :], other=0.0)
    elif MASKED:
        return tl.load(p_x, mask=o_n[:, None] < size, other=0.0)
    elif MASK_D:
        return tl.load(p_x, mask=m_d[None, :], other=0.0)
    else:
        return tl.load(p_x)


@triton.jit
def last_key(KV_LENGTHS, i_b, k_len):
    """Return the number of keys of sample `i_b`."""
    if KV_LENGTHS is not None:
        return tl.minimum(tl.load(KV_LENGTHS + i_b), k_len)
    return k_len


@triton.jit
def block_size(i_block, k_end, K_SIZES, BLOCK_K: tl.constexpr):
    """Return the number of valid keys in one key block, or in each of several blocks."""
    size = tl.minimum(k_end - i_block * BLOCK_K, BLOCK_K)
    if K_SIZES is not None:
        size = tl.minimum(size, tl.load(K_SIZES + i_block))
    return tl.maximum(size, 0)


@triton.jit
def column_keys(o_c, n_c, COLUMNS, K_SIZES, k_end, BLOCK_K: tl.constexpr):
    """Return key index, key block and validity at the places `o_c` of the list of columns."""
    o_key = tl.load(COLUMNS + o_c, mask=o_c < n_c, other=0)
    m_c = (o_c < n_c) & (o_key < k_end)
    o_block = tl.where(m_c, o_key // BLOCK_K, 0)
    m_c = m_c & (o_key % BLOCK_K < block_size(o_block, k_end, K_SIZES, BLOCK_K))
    return o_key, o_block, m_c


@triton.jit
def covered(COVER, i_row, n_bytes, o_block, m_block):
    """Return whether row `i_row` reads block `o_block` exactly. COVER has one bit per block."""
    b_bits = tl.load(COVER + i_row.to(tl.int64) * n_bytes + o_block // 8, mask=m_block, other=0)
    return ((b_bits.to(tl.int32) >> (o_block % 8)) & 1) == 1


@triton.jit
def mean_weights(UNREAD, i_row, o_block, n_k):
    """Load the weights of block means in row `i_row`: log2 of their number of keys; see `unread_kernel`."""
    return tl.load(UNREAD + i_row.to(tl.int64) * padded_blocks(n_k) + o_block).to(tl.float32)


@triton.jit
def padded_blocks(n_k):
    """Return the length of a row of weights, padded to whole tiles so that kernels load it without a mask."""
    return (n_k + 127) // 128 * 128
