"""Reference implementation of look-up attention in torch."""

import torch
from jaxtyping import Bool, Complex, Float, Int, UInt8
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
    positions: Int[Tensor, "b _hp n"] | None = None,
    frequencies: Float[Tensor, " half"] | None = None,
) -> tuple[Float[Tensor, "b h r d"], Float[Tensor, "b h r"]]:
    """Return attention and its natural log-sum-exp; see `lut_attention`."""
    table = look_up_table(q, k_centroids, scale)
    index = k_codes.long().mT[:, :, None].expand(-1, -1, q.shape[2], -1, -1)
    if positions is None or frequencies is None:
        scores = table.gather(4, index).sum(3)
    else:
        books, parts = _per_head(k_centroids, q), torch.arange(k_codes.shape[3], device=q.device)
        heads = torch.arange(q.shape[1], device=q.device)[:, None, None]
        keys = books[heads, parts, k_codes.long()].flatten(3).to(wide(q))
        scores = q.to(keys.dtype) @ turned_pairs(keys, factors(positions, frequencies)).mT * scale
    if visible is not None:
        scores = scores.masked_fill(~visible[:, :, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None])
    # Sums of the weights of the tokens of each code, then one product with the centroids.
    by_code = torch.zeros_like(table)
    index = v_codes.long().mT[:, :, None].expand_as(index)
    by_code.scatter_add_(4, index, weights[:, :, :, None].expand_as(index))
    o = torch.einsum("bhrmc,hmcw->bhrmw", by_code, _per_head(v_centroids, q).to(table.dtype))
    return o.flatten(3).to(q.dtype), lse


def factors(
    positions: Int[Tensor, "*lead"], frequencies: Float[Tensor, " half"]
) -> Complex[Tensor, "*lead half"]:
    """Return the complex factors of RoPE, for pairs of channels as complex numbers."""
    angles = positions[..., None].double() * frequencies.double()
    return torch.polar(torch.ones_like(angles), angles)


def turned_pairs(
    x: Float[Tensor, "b h n d"], factors: Complex[Tensor, "b _h n half"]
) -> Float[Tensor, "b h n d"]:
    """Return keys after RoPE, for channels in the order 0, d / 2, 1, d / 2 + 1, ..."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * factors.to(pairs.dtype)).flatten(-2)


def turning_table(
    q: Float[Tensor, "b h r d"], centroids: Float[Tensor, "_h m c w"], scale: float
) -> Float[Tensor, "b h r m c w"]:
    """Return two scores for each plane of all centroids: the factors of cos and sin of its angle."""
    parts = q.unflatten(-1, (-1, centroids.shape[3])).to(wide(q)) * scale
    books = _per_head(centroids, q).to(parts.dtype)
    q_real, q_imag = parts.unflatten(-1, (-1, 2)).unbind(-1)
    c_real, c_imag = books.unflatten(-1, (-1, 2)).unbind(-1)

    def product(x: Tensor, y: Tensor) -> Tensor:
        return torch.einsum("bhrmp,hmcp->bhrmcp", x, y)

    cos = product(q_real, c_real) + product(q_imag, c_imag)
    sin = product(q_imag, c_real) - product(q_real, c_imag)
    return torch.stack([cos, sin], -1).flatten(-2)


def look_up_table(
    q: Float[Tensor, "b h r d"], centroids: Float[Tensor, "_h m c w"], scale: float
) -> Float[Tensor, "b h r m c"]:
    """Return the scores of all centroids for each query, in fp32 or wider."""
    parts = q.unflatten(-1, (-1, centroids.shape[3])).to(wide(q)) * scale
    return torch.einsum("bhrmw,hmcw->bhrmc", parts, _per_head(centroids, q).to(parts.dtype))


def _per_head(centroids: Tensor, q: Tensor) -> Tensor:
    return centroids.expand(q.shape[1], -1, -1, -1)
