"""Extrapolation of tokens that do not run in a step."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

CAP = 1.0
"""Largest extrapolation factor. Beyond one interval, a linear forecast is worse than a constant one."""
DAMPING = 0.5
"""Damping of the extrapolation before the first fit; the best constant on the trained models."""
LARGEST_CORRECTION = 4.0
"""Largest sum of intervals that a step corrects, in units of its own interval."""
FORGET = 0.5
"""Factor of the fit's earlier sums at each update."""


@dataclass(frozen=True)
class Distance:
    """Distance of a noise level to each token's last updates. `n` is 1 if all tokens of a row are updated together."""

    factor: Float[Tensor, "r n"]
    """Extrapolation factor of each token, see `extrapolation_factor`."""
    same: Float[Tensor, "r n"]
    """1 for tokens whose last update had this noise level, else 0."""
    gap: Float[Tensor, "r n"]
    """Difference of noise levels to the last update."""


def extrapolation_factor(
    sigma: Float[Tensor, ""],
    last: Float[Tensor, "s n"],
    previous: Float[Tensor, "s n"],
) -> Float[Tensor, "s n"]:
    """Return (sigma - last) / (last - previous), clamped to [0, CAP]; 0 for tokens with a single update.

    Args:
        sigma: noise level of this step.
        last, previous: noise levels of each token's last two updates.
    """
    gap = last - previous
    factor = (sigma - last) / torch.where(gap == 0, torch.ones_like(gap), gap)
    return torch.where(gap == 0, 0.0, factor).clamp(0, CAP)


def extrapolate(
    last: Float[Tensor, "r n ..."], delta: Float[Tensor, "r n ..."], factor: Float[Tensor, "r n"]
) -> Float[Tensor, "r n ..."]:
    """Return last + factor * delta; delta is the change between a token's last two updates."""
    factor = factor.reshape(*factor.shape, *[1] * (last.ndim - 2)).to(last.dtype)
    return torch.addcmul(last, factor, delta)
