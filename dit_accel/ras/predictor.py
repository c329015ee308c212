"""What stands in for the tokens that a step leaves out."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

CAP = 1.0
"""Largest extrapolation factor: beyond one interval a line is worse than a constant."""
DAMPING = 0.5
"""Damping of a line before anything was fitted: best on the trained models if there is to be one number."""
LARGEST_CORRECTION = 4.0
"""A step makes up for at most so many times its own interval."""
FORGET = 0.5
"""What the sums of the fit keep from one update to the next."""


@dataclass(frozen=True)
class Distance:
    """How far a noise level is from each token's last updates. `n` is 1 where all tokens of a row share them."""

    factor: Float[Tensor, "r n"]
    """How far each token's line has to be followed."""
    same: Float[Tensor, "r n"]
    """1 for tokens whose last update had this very noise level, else 0."""
    gap: Float[Tensor, "r n"]
    """Difference of noise levels to the last update."""


def extrapolation_factor(
    sigma: Float[Tensor, ""],
    last: Float[Tensor, "s n"],
    previous: Float[Tensor, "s n"],
) -> Float[Tensor, "s n"]:
    """(sigma - last) / (last - previous) in [0, CAP]; 0 where a token has one update only.

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
    """last + factor * delta, delta being the change between a token's last two updates."""
    factor = factor.reshape(*factor.shape, *[1] * (last.ndim - 2)).to(last.dtype)
    return torch.addcmul(last, factor, delta)
