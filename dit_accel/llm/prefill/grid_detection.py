"""Stride and phase of the keys that heads attend to at even distances, from the attention of the last queries."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.llm.prefill.estimate import last_query_sums

LAGS = 16
"""Distances of the largest autocorrelations, which are compared as strides."""
PERIODS = 8
"""Keys of a grid, at least."""
EVENNESS = 1 / 3
"""Least ratio of (sum sqrt(w))^2 to n sum w for the weights w of the n keys of a grid; 1: all are equal."""
SIGNIFICANCE = 6.0
"""Least excess of a grid in standard deviations of as many random keys."""


class Grids(NamedTuple):
    """Stride and phase of each head, 0 where it has none."""

    stride: Int[Tensor, "b h"]
    phase: Int[Tensor, "b h"]
    """Position of the first key, below the stride."""
    gain: Float[Tensor, "b h"]
    """Attention that the keys of the grid hold in excess of as many average keys."""


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
    """Find the grid of keys that the last queries of each head attend to.

    The best grid is the one whose keys hold most in excess of as many average keys. Half of the true stride holds the
    same on twice as many keys, and twice the stride holds half of it. Strides are compared by square roots of the
    weights, which a few strong keys disturb less; keys of very uneven weights are no grid.

    Args:
        q: queries at the last positions, `[B, Hq, Lq, D]`.
        k: keys `[B, Hkv, Lk, D]`.
        scale: factor of the dot products.
        sink, window: first keys, and last keys of each query, that do not count.
        last: number of queries.
        min_gain: least gain of a grid, as a share of the attention of a query.
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
    """Strides up to `longest` to compare, `[B, H, n]`: distances of large autocorrelation and their common divisors.

    All multiples of a stride correlate about equally, so that the stride itself may not be among the best.
    """
    n = roots.shape[-1]
    spectrum = torch.fft.rfft(roots - roots.mean(-1, keepdim=True), 2 * n)
    correlation = torch.fft.irfft(spectrum.abs().square(), 2 * n)[..., 2 : longest + 1]
    lags = correlation.topk(min(LAGS, longest - 1), -1).indices + 2
    divisors = torch.gcd(lags[..., :1], lags[..., 1:])
    return torch.cat([lags, divisors.clamp(min=2)], -1)


def _held(sums: Tensor, first: int, stride: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Return the excess that the keys of each phase hold over average ones, `[B, H, longest]`: roots and weights.

    Roots are 0 where the weights are too uneven or may be chance. `sums` begins with key `first`; a head has one stride.
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
    """Return the keys of the grids as a plan's `columns`. Waits for the device."""
    stride = grids.stride[..., None]
    counts = torch.where(stride > 0, -(-kv_len // stride.clamp(min=1)), 1)
    keys = grids.phase[..., None] + torch.arange(int(counts.max()), device=stride.device) * stride
    return keys.masked_fill((stride == 0) | (keys >= kv_len), kv_len).int()
