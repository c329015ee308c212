"""Token orders: which latent tokens share a block."""

import functools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class TokenOrder:
    """A permutation into tiles, padded so that every tile starts at a multiple of its size."""

    gather: Int[Tensor, " padded"]
    """Raster token at each padded place (padding repeats token 0)."""
    scatter: Int[Tensor, " tokens"]
    """Padded place of each raster token."""
    sizes: Int[Tensor, " tiles"] | None
    """Valid tokens of each tile; None when every tile is full."""

    def apply(self, x: Float[Tensor, "b h l d"]) -> Float[Tensor, "b h p d"]:
        return x.index_select(2, self.gather)

    def undo(self, x: Float[Tensor, "b h p d"]) -> Float[Tensor, "b h l d"]:
        return x.index_select(2, self.scatter)


@functools.lru_cache(maxsize=16)
def tile_order(
    grid: tuple[int, int, int], tile: tuple[int, int, int], device: torch.device
) -> TokenOrder:
    """Tiles of shape `tile` over a latent grid `(t, h, w)`; tiles at the far edges may be ragged.

    Tiles follow each other in raster order, and so do the tokens within a tile.
    """
    counts = [math.ceil(n / size) for n, size in zip(grid, tile, strict=True)]
    t, h, w = (torch.arange(n) // size for n, size in zip(grid, tile, strict=True))
    owner = ((t[:, None, None] * counts[1] + h[:, None]) * counts[2] + w).flatten()
    sizes = torch.bincount(owner, minlength=math.prod(counts))
    order = torch.argsort(owner, stable=True)
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(len(owner)) - starts[owner[order]]
    block = math.prod(tile)
    scatter = torch.empty_like(owner)
    scatter[order] = owner[order] * block + rank
    gather = torch.zeros(len(sizes) * block, dtype=torch.long)
    gather[scatter] = torch.arange(len(owner))
    ragged = bool((sizes != block).any())
    return TokenOrder(
        gather=gather.to(device),
        scatter=scatter.to(device),
        sizes=sizes.int().to(device) if ragged else None,
    )
