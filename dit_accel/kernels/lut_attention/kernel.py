"""Triton kernel of look-up attention. README.md has the equations.

Scores in the table are in base 2 (they include log2 e). A row is one query of a head of keys.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.launch import Launch

PROGRAMS = 512
"""Approximate number of programs of a launch: a few for each SM of a large chip."""
SPAN = 256
"""Smallest number of tokens of a program."""
TILE = 4096
"""Number of decoded values that exist at a time, limited by registers."""
COUNTS = (
    "k_b",
    "k_h",
    "k_l",
    "v_b",
    "v_h",
    "v_l",
    "heads",
    "books",
    "n_rows",
    "length",
    "span",
    "m_b",
    "m_h",
    "p_b",
    "p_h",
)
HALF_ANGLE = tl.constexpr(math.pi / 2**32)
"""Half of the angle of the smallest part of a turn, in radians."""


@triton.jit
def cos_and_sin(parts):
    """Return cos and sin of int32 angles, in parts of 2**32 of a turn, from series of half the angle in [-pi / 2, pi / 2].

    The chip's own functions support angles of any size, for which they need local memory.
    """
    u = parts.to(tl.float32) * HALF_ANGLE
    y = u * u
    s = 1 / 120 + y * (-1 / 5040 + y * (1 / 362880 - y * (1 / 39916800)))
    s = u * (1 + y * (-1 / 6 + y * s))
    c = 1 / 24 + y * (-1 / 720 + y * (1 / 40320 + y * (-1 / 3628800 + y * (1 / 479001600))))
    c = 1 + y * (-1 / 2 + y * c)
    return c * c - s * s, 2 * s * c


@triton.jit(do_not_specialize=COUNTS)
def lut_kernel(
    TABLE, CENTROIDS, K, V, MASK, POSITIONS, TURNS, OUT, LSE,
    k_b, k_h, k_l, v_b, v_h, v_l, heads, books, n_rows, length, span, m_b, m_h, p_b, p_h,
    M: tl.constexpr, C: tl.constexpr, W: tl.constexpr, MP: tl.constexpr, WP: tl.constexpr,
    TN: tl.constexpr,
):  # fmt: skip
    """Compute, for one row and span: s = sum_m table[m, k[m]], out = sum softmax(s) centroids[v], lse = log2 sum exp2(s).

    With positions, the table has two scores for each plane p of a centroid, and
    s = sum_m,p cos(angle) table[m, k[m], p, 0] + sin(angle) table[m, k[m], p, 1].
    """
    # Programs of the rows of a head are neighbours, so that they share the head's codes in the L2 cache.
    i_row, i_split = tl.program_id(0) % n_rows, tl.program_id(0) // n_rows
    n_splits = tl.num_programs(0) // n_rows
    i_bh = tl.program_id(1)
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    o_n, o_m, o_w = tl.arange(0, TN), tl.arange(0, MP), tl.arange(0, WP)
    m_m, m_w = o_m < M, o_w < W
    K += i_b * k_b + i_h * k_h
    V += i_b * v_b + i_h * v_h
    # Table entries per centroid.
    E: tl.constexpr = 1 if POSITIONS is None else W
    TABLE += (i_bh.to(tl.int64) * n_rows + i_row) * M * C * E
    CENTROIDS += (i_h % books) * M * C * W
    b_top = tl.full([1], float("-inf"), tl.float32)
    b_sum = tl.zeros([1], tl.float32)
    b_o = tl.zeros([MP, WP], tl.float32)
    begin = i_split * span
    end = tl.minimum(begin + span, length)
    for c in tl.range(begin, end, TN):
        o_t = c + o_n
        m_t = o_t < end
        if MASK is not None:
            m_t = m_t & (tl.load(MASK + i_b * m_b + i_h * m_h + o_t, mask=m_t, other=0) != 0)
        m_c = m_t[:, None] & m_m[None, :]
        o_row = o_t.to(tl.int64)[:, None]
        # [TN, MP]
        b_k = tl.load(K + o_row * k_l + o_m[None, :], mask=m_c, other=0).to(tl.int32)
        b_v = tl.load(V + o_row * v_l + o_m[None, :], mask=m_c, other=0).to(tl.int32)
        if POSITIONS is None:
            b_part = tl.load(TABLE + (o_m[None, :] * C + b_k), mask=m_c, other=0.0)
        else:
            b_at = tl.load(POSITIONS + i_b * p_b + i_h * p_h + o_t, mask=m_t, other=0)
            b_part = tl.zeros([TN, MP], tl.float32)
            for p in tl.static_range(W // 2):
                # The 32-bit product drops whole turns.
                b_turn = tl.load(TURNS + o_m * (W // 2) + p, mask=m_m, other=0)
                b_cos, b_sin = cos_and_sin(b_at[:, None] * b_turn[None, :])
                o_p = (o_m[None, :] * C + b_k) * W + 2 * p
                b_part += b_cos * tl.load(TABLE + o_p, mask=m_c, other=0.0)
                b_part += b_sin * tl.load(TABLE + o_p + 1, mask=m_c, other=0.0)
        # [TN]
        b_s = tl.where(m_t, tl.sum(b_part, 1), float("-inf"))
        b_new = tl.maximum(b_top, tl.max(b_s, 0))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_scale = tl.exp2(b_top - b_base)
        b_p = tl.exp2(b_s - b_base)
        # [TN, MP, WP]
        o_v = (o_m[None, :] * C + b_v)[:, :, None] * W + o_w[None, None, :]
        b_x = tl.load(CENTROIDS + o_v, mask=m_c[:, :, None] & m_w[None, None, :], other=0.0)
        b_sum = b_sum * b_scale + tl.sum(b_p, 0)
        b_o = b_o * b_scale[:, None] + tl.sum(b_p[:, None, None] * b_x.to(tl.float32), 0)
        b_top = b_new
    some = b_sum > 0
    b_o = b_o / tl.where(some, b_sum, 1.0)[:, None]
    b_lse = tl.where(some, b_top + tl.log2(tl.where(some, b_sum, 1.0)), float("-inf"))
    i_out = (i_bh.to(tl.int64) * n_splits + i_split) * n_rows + i_row
    o_out = o_m[:, None] * W + o_w[None, :]
    tl.store(OUT + i_out * M * W + o_out, b_o, mask=m_m[:, None] & m_w[None, :])
    tl.store(LSE + i_out + tl.arange(0, 1), b_lse)


def lut_launch(
    table: Tensor,
    k_codes: Tensor,
    v_codes: Tensor,
    v_centroids: Tensor,
    visible: Tensor | None = None,
    positions: Tensor | None = None,
    turns: Tensor | None = None,
) -> tuple[Launch, Tensor, Tensor]:
    """Return the launch and its outputs: `o` `[B, H, splits, rows, D]` and the log2-sum-exp, both fp32.

    Args:
        table: fp32 scores of all centroids in base 2, contiguous: `[B, H, rows, M, C]`, or `[B, H, rows, M, C, W]` for
            keys that are rotated.
        k_codes, v_codes: uint8 codes `[B, H, N, M]`, contiguous along M.
        v_centroids: centroids of values `[1 or H, M, C, W]`, contiguous.
        visible: tokens that are read, bool `[B, 1 or H, N]`.
        positions: positions of keys that are rotated, int32 `[B, 1 or H, N]`.
        turns: angle of each plane from one position to the next, `[M W / 2]`, int32, in parts of 2**32 of a turn.
    """
    batch, heads, rows, parts, count = table.shape[:5]
    length, width = k_codes.shape[2], v_centroids.shape[3]
    part_width, padded = triton.next_power_of_2(width), triton.next_power_of_2(parts)
    tile = max(1, min(64, TILE // (padded * part_width)))
    span = max(SPAN, -(-length // max(1, PROGRAMS // (batch * heads * rows))))
    span = -(-span // tile) * tile
    splits = -(-length // span)
    out = table.new_empty(batch, heads, splits, rows, parts * width)
    lse = table.new_empty(batch, heads, splits, rows)
    mask = None if visible is None else visible.contiguous().view(torch.uint8)
    arguments: dict[str, Any] = {
        "TABLE": table,
        "CENTROIDS": v_centroids,
        "K": k_codes,
        "V": v_codes,
        "MASK": mask,
        "POSITIONS": None if positions is None else positions.contiguous(),
        "TURNS": turns,
        "OUT": out,
        "LSE": lse,
        **{f"k_{a}": n for a, n in zip("bhl", k_codes.stride()[:3], strict=True)},
        **{f"v_{a}": n for a, n in zip("bhl", v_codes.stride()[:3], strict=True)},
        "heads": heads,
        "books": v_centroids.shape[0],
        "n_rows": rows,
        "length": length,
        "span": span,
        "m_b": 0 if mask is None else mask.stride(0),
        "m_h": 0 if mask is None or mask.shape[1] == 1 else mask.stride(1),
        "p_b": 0 if positions is None else positions.shape[1] * length,
        "p_h": 0 if positions is None or positions.shape[1] == 1 else length,
    }
    constants: dict[str, int | bool | str] = {
        "M": parts,
        "C": count,
        "W": width,
        "MP": padded,
        "WP": part_width,
        "TN": tile,
    }
    grid = (splits * rows, batch * heads)
    return Launch(lut_kernel, grid, arguments, constants, 4, 1), out, lse


LOG2_E = math.log2(math.e)
