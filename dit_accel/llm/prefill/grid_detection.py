"""Detection of grids: stride and phase of regularly spaced keys with high attention from the last queries."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.llm.prefill.estimate import last_query_sums

LAGS = 16
"""Number of lags with the largest autocorrelation that are tested as strides."""
PERIODS = 8
"""Smallest number of keys in a grid."""
EVENNESS = 1 / 3
"""Smallest ratio of (sum sqrt(w))^2 to n sum w for the weights w of the n keys of a grid; 1 means that all are equal."""
SIGNIFICANCE = 6.0
"""Smallest excess of a grid over random keys, in standard deviations."""


class Grids(NamedTuple):
    """Stride and phase of the grid of each head; 0 for heads without a grid."""

    stride: Int[Tensor, "b h"]
    phase: Int[Tensor, "b h"]
    """Position of the first grid key, less than the stride."""
    gain: Float[Tensor, "b h"]
    """Attention of the grid keys minus that of the same number of average keys."""


@torch.no_grad()
def detect(
    q: Float[Tensor, "b h_q l_q d"],
    k: Float[Tensor, "b h_kv l_k d"],
    *,
    scale: float,
    sink: int = 64,
    window: int = 1024,
    last: int = 64,
    min_gain: float | int = 0.05,
) -> Grids:
    """Detect the grid of keys that the last queries of each head attend to.

    The best grid has the largest excess of attention over the same number of average keys. This penalises half of the true
    stride, which needs twice as many keys, and twice the true stride, which misses half of the attention. Strides are
    compared by square roots of the attention weights, which are less sensitive to a few strong keys. Keys with very uneven
    weights do not count as a grid.

    Args:
        q: queries at the last positions, `[B, Hq, Lq, D]`.
        k: keys `[B, Hkv, Lk, D]`.
        scale: factor of the dot products.
        sink: number of first keys to ignore.
        window: number of last keys of each query to ignore.
        last: number of last queries to use.
        min_gain: smallest gain of a grid, as a share of the attention of a query.
    """
    sums = last_query_sums(q, k, scale=scale, last=last).columns
    first, stop = sink, k.shape[2] - min(last, q.shape[2]) - window + 1
    longest = max(0, stop - first) // PERIODS
    none = torch.zeros(sums.shape[:2], dtype=torch.long, device=q.device)
    if longest < 2:
        return Grids(none, none, none.to(sums))
    middle = sums[..., first:stop]
    best, excess = Grids(none, none, none.to(sums)), none.to(sums)
    for stride in _candidates(middle.sqrt(), longest).unbind(-1):
        excesses, gains = _held(middle, first, stride, longest)
        most, phase = excesses.masked_fill(gains < min_gain, 0.0).max(-1)
        found = Grids(stride, phase, gains.gather(-1, phase[..., None])[..., 0])
        better = most > excess
        excess = torch.where(better, most, excess)
        best = Grids(*(torch.where(better, x, y) for x, y in zip(found, best, strict=True)))
    return best


def _candidates(roots: Tensor, longest: int) -> Tensor:
    """Return candidate strides up to `longest`, `[B, H, n]`: lags with large autocorrelation and their common divisors.

    All multiples of a stride have about the same autocorrelation, so the stride itself may not be among the largest.
    """
    n = roots.shape[-1]
    spectrum = torch.fft.rfft(roots - roots.mean(-1, keepdim=True), 2 * n)
    correlation = torch.fft.irfft(spectrum.abs().square(), 2 * n)[..., 2 : longest + 1]
    lags = correlation.topk(min(LAGS, longest - 1), -1).indices + 2
    divisors = torch.gcd(lags[..., :1], lags[..., 1:])
    return torch.cat([lags, divisors.clamp(min=2)], -1)


def _held(sums: Tensor, first: int, stride: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Return the excess of the keys of each phase over average keys, `[B, H, longest]`, in square roots and in weights.

    The excess in square roots is 0 if the weights are too uneven or may be random. `sums` starts at key `first`. `stride`
    holds one stride per head.
    """
    phase = (torch.arange(sums.shape[-1], device=sums.device) + first) % stride[..., None]
    empty = sums.new_zeros(*sums.shape[:2], longest)
    roots = sums.sqrt()
    held, weight, count = (
        empty.scatter_add(-1, phase, x) for x in (roots, sums, torch.ones_like(sums))
    )
    excess = held - count * roots.mean(-1, keepdim=True)
    even = held.square() >= EVENNESS * count * weight
    clear = excess >= SIGNIFICANCE * (count * roots.var(-1, keepdim=True)).sqrt()
    return excess.masked_fill(~(even & clear), 0.0), weight - count * sums.mean(-1, keepdim=True)


def grid_columns(grids: Grids, kv_len: int) -> Int[Tensor, "b h n"]:
    """Return the keys of grids as `columns` of a `SparsePlan`. Synchronizes with the device."""
    stride = grids.stride[..., None]
    counts = torch.where(stride > 0, -(-kv_len // stride.clamp(min=1)), 1)
    keys = grids.phase[..., None] + torch.arange(int(counts.max()), device=stride.device) * stride
    return keys.masked_fill((stride == 0) | (keys >= kv_len), kv_len).int()
