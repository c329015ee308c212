"""Feature maps of linear attention, applied to unscaled queries and keys, and their gradients."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

FeatureMap = Literal["softmax", "elu", "relu"]
FEATURE_MAPS: tuple[str, ...] = get_args(FeatureMap)


def features(
    x: Float[Tensor, "*b d"], feature_map: str, *, out: Float[Tensor, "*b d"] | None = None
) -> Float[Tensor, "*b d"]:
    """Return phi(x) >= 0: softmax over `d`, elu(x) + 1, or relu(x). Differentiable without `out`."""
    if feature_map == "softmax":
        return torch.softmax(x, -1) if out is None else torch.softmax(x, -1, out=out)
    if out is not None:
        out.copy_(x)
        return F.elu_(out).add_(1) if feature_map == "elu" else F.relu_(out)
    return F.elu(x) + 1 if feature_map == "elu" else F.relu(x)


def features_backward(
    x: Float[Tensor, "*b d"],
    phi: Float[Tensor, "*b d"],
    grad_phi: Float[Tensor, "*b d"],
    feature_map: str,
) -> Float[Tensor, "*b d"]:
    """Return the gradient of `x`, given phi(x) and the gradient of phi(x)."""
    if feature_map == "softmax":
        return phi * (grad_phi - (grad_phi * phi).sum(-1, keepdim=True))
    if feature_map == "elu":
        return grad_phi * torch.where(x > 0, torch.ones_like(phi), phi)
    return grad_phi * (x > 0)
