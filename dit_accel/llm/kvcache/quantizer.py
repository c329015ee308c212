"""`Quantizer`: product quantisation of vectors into codes of their sub-vectors."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import embedding_bag

from dit_accel.llm.kvcache.packing import pack, unpack

DISTANCES = 2**19
"""Largest number of distances in memory while encoding, so that they stay in the CPU cache."""
VIEWS = {4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""Dtypes by size in bytes. Viewing a centroid as one element of such a dtype makes gathering four times faster."""


@dataclass(frozen=True, eq=False)
class Quantizer:
    """Product quantiser for the keys or the values of one layer.

    The channels of a vector are reordered and divided into `m` sub-vectors of `w` channels. Each sub-vector is stored as
    the index of its nearest centroid.
    """

    centroids: Float[Tensor, "_h m c w"]
    """Centroids of each sub-vector, shared by the heads (first size 1) or per head."""
    planes: bool = False
    """True: channels are ordered 0, d / 2, 1, d / 2 + 1, ..., so that pairs rotated by RoPE are adjacent. False: original
    order."""
    mean: Float[Tensor, "h d"] | None = None
    """Mean of each head, subtracted before coding; None for no mean."""

    @cached_property
    def bits(self) -> int:
        """Number of bits of a code."""
        return int(self.centroids.shape[2] - 1).bit_length()

    @cached_property
    def table(self) -> Float[Tensor, "rows w"]:
        """Centroids of all heads and sub-vectors in one table."""
        return self.centroids.flatten(0, 2).contiguous()

    @cached_property
    def whole(self) -> Float[Tensor, "_h m c w"]:
        """Centroids plus the mean of their head."""
        if self.mean is None:
            return self.centroids
        parts, width = self.centroids.shape[1::2]
        return self.centroids + self.grouped(self.mean).unflatten(-1, (parts, width))[:, :, None]

    @cached_property
    def offsets(self) -> Int[Tensor, "_h 1 m"]:
        """First row of each sub-vector in `table`."""
        heads, parts, count = self.centroids.shape[:3]
        first = count * torch.arange(heads * parts, device=self.centroids.device)
        return first.view(heads, 1, parts).int()

    def grouped(self, x: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead d"]:
        """Return vectors with channels in the order of the sub-vectors."""
        return x.unflatten(-1, (2, -1)).mT.flatten(-2) if self.planes else x

    def ungrouped(self, x: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead d"]:
        """Return vectors with channels in the original order."""
        return x.unflatten(-1, (-1, 2)).mT.flatten(-2) if self.planes else x

    def centred(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
        """Return vectors in fp32 without their mean, with channels in the order of the sub-vectors."""
        x = x.float()
        return self.grouped(x if self.mean is None else x - self.mean[:, None])

    def encode(self, x: Float[Tensor, "b h n d"]) -> UInt8[Tensor, "b h n bytes"]:
        """Return the packed codes of vectors."""
        heads, parts, _, width = self.centroids.shape
        found = self.centred(x).unflatten(-1, (parts, width))
        rows = (
            found.movedim(1, 0) if heads > 1 else found[None]
        )  # [h, b, n, m, w] or [1, b, h, n, m, w]
        lead = rows.shape[1:-2]
        flat = rows.flatten(1, -3).movedim(2, 1).flatten(0, 1)  # [h m, rows, w]
        codes = nearest(flat, self.centroids.flatten(0, 1))
        codes = codes.unflatten(0, (heads, parts)).movedim(1, 2).unflatten(1, lead)
        codes = codes.movedim(0, 1) if heads > 1 else codes[0]
        return pack(codes.to(torch.uint8), self.bits)

    def numbers(self, codes: UInt8[Tensor, "b h n bytes"]) -> UInt8[Tensor, "b h n m"]:
        """Return the unpacked code of each sub-vector."""
        return unpack(codes, self.bits)

    def rows(self, codes: UInt8[Tensor, "b h n bytes"]) -> Float[Tensor, "b h n d"]:
        """Return decoded vectors without their mean, with channels in the order of the sub-vectors."""
        index = (self.numbers(codes).int() + self.offsets).flatten()
        table = self.table
        kind = VIEWS.get(table.shape[1] * table.element_size())
        if kind is None:
            chosen = table.index_select(0, index)
        else:
            chosen = table.view(kind).flatten().index_select(0, index).view(table.dtype)
        return chosen.view(*codes.shape[:3], self.centroids.shape[1] * table.shape[1])

    def scores(
        self, q: Float[Tensor, "b h g l_q d"], codes: UInt8[Tensor, "b h n bytes"]
    ) -> Float[Tensor, "b h g l_q n"]:
        """Return the dot products of queries (channels in the order of the sub-vectors) with decoded vectors without their mean.

        The dot product of each query sub-vector with each centroid is computed once and looked up for each code.
        """
        rows, heads, group, length, _ = q.shape
        shared, parts, count, width = self.centroids.shape
        split = q.flatten(2, 3).unflatten(-1, (parts, width))
        books = self.centroids.expand(heads, -1, -1, -1) if shared == 1 else self.centroids
        products = torch.einsum("bhrmw,hmcw->bhmcr", split, books)
        first = torch.arange(rows * heads * parts, device=q.device, dtype=torch.int32) * count
        index = self.numbers(codes).int() + first.view(rows, heads, 1, parts)
        found = embedding_bag(index.flatten(0, 2), products.flatten(0, 3), mode="sum")
        return found.view(rows, heads, -1, group, length).movedim(2, -1)

    def decode(self, codes: UInt8[Tensor, "b h n bytes"]) -> Float[Tensor, "b h n d"]:
        """Return decoded vectors with channels in the original order."""
        found = self.ungrouped(self.rows(codes))
        return found if self.mean is None else found + self.mean[:, None]


def nearest(x: Float[Tensor, "m n w"], centroids: Float[Tensor, "m c w"]) -> Int[Tensor, "m n"]:
    """Return the index of the nearest centroid of each vector."""
    bias = centroids.square().sum(-1)[:, None] / -2
    step, x = max(1, DISTANCES // (centroids.shape[0] * centroids.shape[1])), x.contiguous()
    if not x.shape[1]:
        return torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
    # argmin |x - c|^2 = argmax <x, c> - |c|^2 / 2
    return torch.cat([torch.baddbmm(bias, y, centroids.mT).argmax(-1) for y in x.split(step, 1)], 1)
