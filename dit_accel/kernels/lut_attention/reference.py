"""Look-up attention in torch: the definition."""

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from dit_accel.kernels.precision import wide


def lut_reference(
    q: Float[Tensor, "b h r d"],
    k_codes: UInt8[Tensor, "b h n m"],
    v_codes: UInt8[Tensor, "b h n m"],
    k_centroids: Float[Tensor, "_h m c w"],
    v_centroids: Float[Tensor, "_h m c w"],
    scale: float,
    visible: Bool[Tensor, "b _h n"] | None = None,
) -> tuple[Float[Tensor, "b h r d"], Float[Tensor, "b h r"]]:
    """Return attention and its natural log-sum-exp; see `lut_attention`."""
    table = look_up_table(q, k_centroids, scale)
    index = k_codes.long().mT[:, :, None].expand(-1, -1, q.shape[2], -1, -1)
    scores = table.gather(4, index).sum(3)
    if visible is not None:
        scores = scores.masked_fill(~visible[:, :, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None])
    # Weights of the tokens with each code, then one product with the centroids.
    by_code = torch.zeros_like(table)
    index = v_codes.long().mT[:, :, None].expand_as(index)
    by_code.scatter_add_(4, index, weights[:, :, :, None].expand_as(index))
    o = torch.einsum("bhrmc,hmcw->bhrmw", by_code, _per_head(v_centroids, q).to(table.dtype))
    return o.flatten(3).to(q.dtype), lse


def look_up_table(
    q: Float[Tensor, "b h r d"], centroids: Float[Tensor, "_h m c w"], scale: float
) -> Float[Tensor, "b h r m c"]:
    """Return the scores of all centroids for each query, at least in fp32."""
    parts = q.unflatten(-1, (-1, centroids.shape[3])).to(wide(q)) * scale
    return torch.einsum("bhrmw,hmcw->bhrmc", parts, _per_head(centroids, q).to(parts.dtype))


def _per_head(centroids: Tensor, q: Tensor) -> Tensor:
    return centroids.expand(q.shape[1], -1, -1, -1)
