"""Triton kernels that sum the attention of a few queries by key and by distance. README.md has the equations.

Scores are in base 2 (`scale` includes log2 e). A row is one query of one head, at position `first + row * step + offset`.
"""

import functools
import math
import operator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_sparse.tiles import Target, multiplies_from_memory, pad
from dit_accel.kernels.launch import Launch
from dit_accel.kernels.tile_math import aligned, load_rows, load_tile

SPLITS = 32
"""Number of spans of keys with a separate log-sum-exp, so that a few heads already give many programs."""
COUNTS = (
    "first", "step", "n_rows", "n_tiles", "k_len", "offset", "group", "span", "n_q_blocks", "n_k_blocks",
    "read_b", "read_h", "read_group",
)  # fmt: skip


@triton.jit
def _rows(i_tile, first, step, n_rows, TQ: tl.constexpr):
    """Return the row numbers of a tile, their queries, and the mask of existing rows."""
    o_row = i_tile * TQ + tl.arange(0, TQ)
    return o_row, first + o_row * step, o_row < n_rows


@triton.jit
def _log_sums(LSE, i_bh, o_row, m_row, n_rows, TQ: tl.constexpr, SPLITS: tl.constexpr):
    """Return log2 of the sums of some rows over all keys, from the values of the spans."""
    o_split = tl.arange(0, SPLITS)
    p_lse = LSE + (i_bh * n_rows + o_row)[:, None] * SPLITS + o_split[None, :]
    # [TQ, SPLITS]
    b_part = tl.load(p_lse, mask=m_row[:, None], other=0.0)
    b_top = tl.max(b_part, 1)  # finite, because a query sees its own key
    return b_top + tl.log2(tl.sum(tl.exp2(b_part - b_top[:, None]), 1))


@triton.jit(do_not_specialize=COUNTS)
def row_sums_kernel(
    Q, K, LSE, q_b, q_h, q_l, k_b, k_h, k_l,
    first, step, n_rows, n_tiles, k_len, offset, group, span, scale,
    HEAD_DIM: tl.constexpr, DP: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    SPLITS: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write lse[row, split] = log2 sum exp2(scale q.k) over the visible keys of one span; -inf without a visible key."""
    q_b, q_h, q_l = aligned(q_b, ALIGNED), aligned(q_h, ALIGNED), aligned(q_l, ALIGNED)
    k_b, k_h, k_l = aligned(k_b, ALIGNED), aligned(k_h, ALIGNED), aligned(k_l, ALIGNED)
    MASK_D: tl.constexpr = HEAD_DIM != DP
    i_h = tl.program_id(1) * group + tl.program_id(0) % group
    i_tile = tl.program_id(0) // group % n_tiles
    i_split = tl.program_id(0) // group // n_tiles
    i_b = tl.program_id(2)
    o_row, o_q, m_row = _rows(i_tile, first, step, n_rows, TQ)
    o_d, o_n = tl.arange(0, DP), tl.arange(0, TK)
    m_d = o_d < HEAD_DIM
    Q += i_b.to(tl.int64) * q_b + i_h.to(tl.int64) * q_h
    K += i_b.to(tl.int64) * k_b + tl.program_id(1).to(tl.int64) * k_h
    # [TQ, DP]
    b_q = load_rows(Q, o_q, m_row, q_l, o_d, m_d, MASK_D)
    b_m = tl.full([TQ], float("-inf"), tl.float32)
    b_l = tl.zeros([TQ], tl.float32)
    begin = i_split * span
    seen = first + (tl.minimum((i_tile + 1) * TQ, n_rows) - 1) * step + offset + 1
    end = tl.minimum(tl.minimum(begin + span, k_len), seen)
    for c in tl.range(begin, end, TK):
        start = c + span * 0  # + span * 0: Triton's interpreter needs a tensor
        # [TK, DP]
        b_k = load_tile(K, start, end - start, k_l, o_n, o_d, m_d, True, MASK_D)
        # [TQ, TK]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        o_key = start + o_n
        m_s = (o_key[None, :] < end) & (o_key[None, :] <= (o_q + offset)[:, None])
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_top = tl.maximum(b_m, tl.max(b_s, 1))
        b_base = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_l = b_l * tl.exp2(b_m - b_base) + tl.sum(tl.exp2(b_s - b_base[:, None]), 1)
        b_m = b_top
    some = b_l > 0
    b_lse = tl.where(some, b_m + tl.log2(tl.where(some, b_l, 1.0)), float("-inf"))
    i_bh = (i_b * tl.num_programs(1) * group + i_h).to(tl.int64)
    tl.store(LSE + (i_bh * n_rows + o_row) * SPLITS + i_split, b_lse, mask=m_row)


@triton.jit(do_not_specialize=COUNTS)
def column_sums_kernel(
    Q, K, LSE, READ, OUT, q_b, q_h, q_l, k_b, k_h, k_l,
    first, step, n_rows, k_len, offset, group, n_q_blocks, n_k_blocks, read_b, read_h, read_group,
    scale, factor,
    HEAD_DIM: tl.constexpr, DP: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write out[key] = factor * sum of the weights of a key over all rows; with READ, over the rows that do not read it."""
    q_b, q_h, q_l = aligned(q_b, ALIGNED), aligned(q_h, ALIGNED), aligned(q_l, ALIGNED)
    k_b, k_h, k_l = aligned(k_b, ALIGNED), aligned(k_h, ALIGNED), aligned(k_l, ALIGNED)
    MASK_D: tl.constexpr = HEAD_DIM != DP
    i_h = tl.program_id(1) * group + tl.program_id(0) % group
    i_b = tl.program_id(2)
    i_bh = (i_b * tl.num_programs(1) * group + i_h).to(tl.int64)
    start = tl.program_id(0) // group * TK
    o_key = start + tl.arange(0, TK)
    o_d = tl.arange(0, DP)
    m_d = o_d < HEAD_DIM
    Q += i_b.to(tl.int64) * q_b + i_h.to(tl.int64) * q_h
    K += i_b.to(tl.int64) * k_b + tl.program_id(1).to(tl.int64) * k_h
    if READ is not None:
        READ += (i_b * read_b + i_h // read_group * read_h).to(tl.int64) * n_q_blocks * n_k_blocks
    # [TK, DP]
    b_k = load_rows(K, o_key, o_key < k_len, k_l, o_d, m_d, MASK_D)
    b_sum = tl.zeros([TK], tl.float32)
    for t in tl.range(0, tl.cdiv(n_rows, TQ)):
        o_row, o_q, m_row = _rows(t, first, step, n_rows, TQ)
        # [TQ, DP]
        b_q = load_rows(Q, o_q, m_row, q_l, o_d, m_d, MASK_D)
        b_lse = _log_sums(LSE, i_bh, o_row, m_row, n_rows, TQ, SPLITS)
        # [TQ, TK]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        m_s = m_row[:, None] & (o_key[None, :] <= (o_q + offset)[:, None])
        if READ is not None:
            p_row = READ + (o_q // BLOCK).to(tl.int64)[:, None] * n_k_blocks
            if BLOCK % TK == 0:  # the tile is in one key block: one number for each row
                b_read = tl.load(p_row + start // BLOCK, mask=m_row[:, None], other=1)
            else:
                b_read = tl.load(p_row + o_key[None, :] // BLOCK, mask=m_s, other=1)
            m_s = m_s & (b_read == 0)
        b_sum += tl.sum(tl.where(m_s, tl.exp2(b_s - b_lse[:, None]), 0.0), 0)
    tl.store(OUT + i_bh * k_len + o_key, b_sum * factor, mask=o_key < k_len)


@triton.jit(do_not_specialize=COUNTS)
def diagonal_sums_kernel(
    Q, K, LSE, OUT, q_b, q_h, q_l, k_b, k_h, k_l,
    first, n_rows, k_len, offset, group, scale, factor,
    HEAD_DIM: tl.constexpr, DP: tl.constexpr, TQ: tl.constexpr,
    SPLITS: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write out[d] = factor * sum over consecutive rows of the weight of the key d places before the row's position."""
    q_b, q_h, q_l = aligned(q_b, ALIGNED), aligned(q_h, ALIGNED), aligned(q_l, ALIGNED)
    k_b, k_h, k_l = aligned(k_b, ALIGNED), aligned(k_h, ALIGNED), aligned(k_l, ALIGNED)
    MASK_D: tl.constexpr = HEAD_DIM != DP
    WINDOW: tl.constexpr = 2 * TQ
    i_h = tl.program_id(1) * group + tl.program_id(0) % group
    i_b = tl.program_id(2)
    i_bh = (i_b * tl.num_programs(1) * group + i_h).to(tl.int64)
    o_in = tl.arange(0, TQ)
    nearest = tl.program_id(0) // group * TQ  # first distance of the tile
    o_d = tl.arange(0, DP)
    m_d = o_d < HEAD_DIM
    Q += i_b.to(tl.int64) * q_b + i_h.to(tl.int64) * q_h
    K += i_b.to(tl.int64) * k_b + tl.program_id(1).to(tl.int64) * k_h
    # The key at distance nearest + t of row r is at index TQ - 1 + r - t of the window. [TQ, TQ]
    o_place = TQ - 1 + o_in[:, None] - o_in[None, :]
    b_sum = tl.zeros([TQ], tl.float32)
    for t in tl.range(0, tl.cdiv(n_rows, TQ)):
        o_row, o_q, m_row = _rows(t, first, 1, n_rows, TQ)
        o_key = first + t * TQ + offset - nearest - (TQ - 1) + tl.arange(0, WINDOW)
        m_key = (o_key >= 0) & (o_key < k_len)
        # [TQ, DP], [WINDOW, DP]
        b_q = load_rows(Q, o_q, m_row, q_l, o_d, m_d, MASK_D)
        b_k = load_rows(K, o_key, m_key, k_l, o_d, m_d, MASK_D)
        b_lse = _log_sums(LSE, i_bh, o_row, m_row, n_rows, TQ, SPLITS)
        # [TQ, WINDOW]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        m_s = m_row[:, None] & m_key[None, :] & (o_key[None, :] <= (o_q + offset)[:, None])
        b_p = tl.where(m_s, tl.exp2(b_s - b_lse[:, None]), 0.0)
        # [TQ, TQ]: by row and distance
        b_sum += tl.sum(tl.gather(b_p, o_place, 1), 0)
    o_distance = nearest + o_in
    tl.store(OUT + i_bh * k_len + o_distance, b_sum * factor, mask=o_distance < k_len)


def sums_launches(
    q: Tensor,
    k: Tensor,
    rows: range,
    columns: Tensor,
    diagonals: Tensor | None,
    *,
    scale: float,
    read: Tensor | None = None,
    block: int = 64,
    target: Target | None = None,
) -> list[Launch]:
    """Return the launches that fill `columns`, and `diagonals` if given: fp32 `[B, Hq, Lk]`, contiguous.

    Args:
        q: queries `[B, Hq, Lq, D]`, contiguous along D.
        k: keys `[B, Hkv, Lk, D]`, contiguous along D.
        rows: indices of at least one query; consecutive ones if `diagonals` is given.
        columns: output, mean weight of each key.
        diagonals: output, mean weight of each distance.
        scale: factor of the dot products.
        read: mask of blocks whose pairs count as 0 in `columns`, bool `[B|1, Hq|Hkv|1, T_q, T_k]`.
        block: tokens per block of `read`.
        target: kind of chip. Default: that of the device of `q`.
    """
    assert rows.step == 1 or diagonals is None, (
        f"rows={rows}: accepted with diagonals are consecutive rows"
    )
    target = target or Target.of(q.device)
    batch, heads, _, d = q.shape
    kv_heads, k_len = k.shape[1:3]
    size = tile_rows(d, q.dtype, target)
    span = math.ceil(k_len / SPLITS / size) * size
    group, n_tiles = heads // kv_heads, math.ceil(len(rows) / size)
    lse = columns.new_empty(batch, heads, len(rows), SPLITS)
    cuda, half = target.backend == "cuda", q.dtype != torch.float32
    widths = functools.reduce(operator.or_, (d, *q.stride()[:3], *k.stride()[:3]))
    arguments: dict[str, Any] = {
        "Q": q,
        "K": k,
        "LSE": lse,
        **{f"q_{a}": n for a, n in zip("bhl", q.stride()[:3], strict=True)},
        **{f"k_{a}": n for a, n in zip("bhl", k.stride()[:3], strict=True)},
        "first": rows.start,
        "n_rows": len(rows),
        "k_len": k_len,
        "offset": k_len - q.shape[2],
        "group": group,
        "scale": scale * math.log2(math.e),
    }
    step = {"step": rows.step}
    factor = {"factor": 1 / len(rows)}
    constants: dict[str, int | bool | str] = {
        "HEAD_DIM": d,
        "DP": pad(d),
        "TQ": size,
        "SPLITS": SPLITS,
        "ALIGNED": widths % 8 == 0,  # True if all strides are multiples of 8
        "PRECISION": "ieee" if not cuda else "tf32" if half else "tf32x3",
    }
    tile_k = {"TK": size}

    def launch(kernel: Any, tiles: int, more: dict, sizes: dict, stages: int) -> Launch:
        grid = (tiles * group, kv_heads, batch)
        # The window of diagonals, and the three TF32 products of fp32, need many registers.
        warps = 8 if kernel is diagonal_sums_kernel or not half else 4
        return Launch(kernel, grid, arguments | more, constants | sizes, warps, stages)

    launches = [
        launch(
            row_sums_kernel,
            SPLITS * n_tiles,
            {**step, "n_tiles": n_tiles, "span": span},
            tile_k,
            2 if target.backend == "hip" else 3,
        )
    ]
    shape = (0, 0, 0, 0) if read is None else read.shape
    blocks = {
        "READ": None if read is None else read.contiguous().view(torch.uint8),
        "n_q_blocks": shape[2],
        "n_k_blocks": shape[3],
        "read_b": shape[1] if shape[0] > 1 else 0,
        "read_h": 1,
        "read_group": heads // max(1, shape[1]),
    }
    tiles = math.ceil(k_len / size)
    # Usually there is one tile of rows, so these loops have one step and nothing to prefetch.
    launches.append(
        launch(
            column_sums_kernel,
            tiles,
            {**step, **blocks, **factor, "OUT": columns},
            {**tile_k, "BLOCK": block},
            1,
        )
    )
    if diagonals is not None:
        launches.append(launch(diagonal_sums_kernel, tiles, {**factor, "OUT": diagonals}, {}, 1))
    return launches


def tile_rows(head_dim: int, dtype: torch.dtype, target: Target) -> int:
    """Return the numbers of rows and of keys of a tile. A window of two tiles of keys fits into shared memory."""
    row_bytes = pad(head_dim) * dtype.itemsize
    # These chips have 227 KiB of shared memory, and matrix instructions of at least 64 rows.
    if row_bytes <= 256 or (dtype != torch.float32 and multiplies_from_memory(target)):
        return 64
    return 32 if row_bytes <= 512 else 16
