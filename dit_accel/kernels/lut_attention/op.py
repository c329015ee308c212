"""Public function of look-up attention, and its operator. It runs the kernel on a GPU, else torch."""

import math

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from dit_accel.kernels.launch import runs_here
from dit_accel.kernels.lut_attention.reference import look_up_table, lut_reference, turning_table
from dit_accel.kernels.merge import merge_lse
from dit_accel.kernels.operators import operator
from dit_accel.kernels.precision import wide

MAX_ROWS = 16
"""Largest number of queries per head of keys for the kernel. With more queries, decoding the keys in torch is faster."""
MAX_HEAD_DIM = 256


@torch.no_grad()
def lut_attention(
    q: Float[Tensor, "b h r d"],
    k_codes: UInt8[Tensor, "b h n m"],
    v_codes: UInt8[Tensor, "b h n m"],
    k_centroids: Float[Tensor, "_h m c w"],
    v_centroids: Float[Tensor, "_h m c w"],
    *,
    scale: float,
    visible: Bool[Tensor, "b _h n"] | None = None,
    positions: Int[Tensor, "b _hp n"] | None = None,
    frequencies: Float[Tensor, " half"] | None = None,
) -> tuple[Float[Tensor, "b h r d"], Float[Tensor, "b h r"]]:
    """Return softmax attention over product-quantised keys and values, and its natural log-sum-exp.

    Args:
        q: queries of each head of keys, `[B, H, R, D]`.
        k_codes, v_codes: centroid indices, `[B, H, N, M]`.
        k_centroids, v_centroids: centroids of each sub-vector `[1 or H, M, C, D / M]`, for all heads or for each.
        scale: factor of the dot products.
        visible: mask of tokens that are read, `[B, 1 or H, N]`. Default: all.
        positions: positions of keys that were coded before RoPE, `[B, 1 or H, N]`. RoPE rotates channels 2 i and 2 i + 1
            of the codes as a pair. Default: keys are not rotated.
        frequencies: RoPE angle of each pair of channels from one position to the next, in radians, `[D / 2]`. Needed with
            `positions`.

    Returns:
        `o` in the dtype of `q`, and the log-sum-exp in fp32 (fp64 for fp64); 0 and -inf for queries without a token.

    Raises:
        ValueError: sizes do not match; the message names the argument.
    """
    parts = k_codes.shape[3]
    for name, x in (("k_centroids", k_centroids), ("v_centroids", v_centroids)):
        want = (parts, q.shape[3] // parts)
        if (x.shape[1], x.shape[3]) != want or x.shape[0] not in (1, q.shape[1]):
            raise ValueError(
                f"{name}: shape {tuple(x.shape)}; accepted is [1 or {q.shape[1]}, {want[0]}, C, {want[1]}]"
            )
    if (positions is None) != (frequencies is None):
        raise ValueError(
            "positions, frequencies: only one of them is given; accepted are both or none"
        )
    if frequencies is not None and (
        k_centroids.shape[3] % 2 or len(frequencies) != q.shape[3] // 2
    ):
        raise ValueError(
            f"frequencies: {len(frequencies)} numbers for {q.shape[3]} channels in sub-vectors of {k_centroids.shape[3]}; "
            f"accepted are {q.shape[3] // 2} numbers, and sub-vectors with an even number of channels"
        )
    found = torch.ops.dit_accel.lut_attention(
        q, k_codes, v_codes, k_centroids, v_centroids, float(scale), visible, positions, frequencies
    )
    return found[0], found[1]


def _empty(q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=wide(q))


@operator("lut_attention", _empty)
def _lut_attention(
    q: Tensor,
    k_codes: Tensor,
    v_codes: Tensor,
    k_centroids: Tensor,
    v_centroids: Tensor,
    scale: float,
    visible: Tensor | None,
    positions: Tensor | None,
    frequencies: Tensor | None,
) -> tuple[Tensor, Tensor]:
    small = q.shape[2] <= MAX_ROWS and q.shape[3] <= MAX_HEAD_DIM and k_codes.shape[2] > 0
    if not (small and runs_here(q)):
        return lut_reference(
            q, k_codes, v_codes, k_centroids, v_centroids, scale, visible, positions, frequencies
        )
    from dit_accel.kernels.lut_attention.kernel import LOG2_E, lut_launch

    k_codes, v_codes = (x if x.stride(3) == 1 else x.contiguous() for x in (k_codes, v_codes))
    books, rotated = v_centroids.contiguous(), None
    if positions is None or frequencies is None:
        table = look_up_table(q, k_centroids, scale * LOG2_E)
    else:
        table = turning_table(q, k_centroids, scale * LOG2_E)
        positions, rotated = positions.to(torch.int32), turns(frequencies)
    launch, out, lse = lut_launch(
        table.contiguous(), k_codes, v_codes, books, visible, positions, rotated
    )
    launch()
    spans = [(out[:, :, i], lse[:, :, i] / LOG2_E) for i in range(out.shape[2])]
    o, total = merge_lse(*spans)
    return o.to(q.dtype), total


def turns(frequencies: Float[Tensor, " half"]) -> Int[Tensor, " half"]:
    """Return angles in radians as int32 parts of 2**32 of a turn. Products with positions then drop whole turns."""
    parts = (frequencies.double() / (2 * math.pi) * 2**32).round().long()
    return ((parts + 2**31) % 2**32 - 2**31).to(torch.int32)
