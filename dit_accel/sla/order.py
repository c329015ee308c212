"""`tile_order`: token order in which each block is a tile of the latent grid; `Reordered`: tokens in an order."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from dit_accel.models import AllTokens, Call, TokenOrder, joint_index


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # cached tensors may be used in calls with gradients
def tile_order(
    grid: tuple[int, int, int], tile: tuple[int, int, int], device: torch.device
) -> TokenOrder:
    """Return the token order of tiles over a latent grid, one tile after the other without gaps.

    Tiles are in raster order, and tokens are in raster order within a tile. Tiles at the far edges may be smaller, so
    that later blocks begin inside a tile. Padding smaller tiles was measured to cover less attention mass with more
    blocks.

    Args:
        grid: number of tokens along (t, h, w).
        tile: size of a tile along (t, h, w).
        device: device of the indices.
    """
    counts = [math.ceil(n / size) for n, size in zip(grid, tile, strict=True)]
    t, h, w = (torch.arange(n) // size for n, size in zip(grid, tile, strict=True))
    owner = ((t[:, None, None] * counts[1] + h[:, None]) * counts[2] + w).flatten()
    gather = torch.argsort(owner, stable=True)
    return TokenOrder(gather.to(device), gather.argsort().to(device))


class Reordered(AllTokens):
    """All tokens in another order than raster order."""

    order: TokenOrder | None
    """Order of the current call; None: raster order."""

    def __init__(self) -> None:
        self.end_call()

    def begin_call(self, call: Call, order: TokenOrder | None) -> None:
        """Begin a call on tokens in this order; None: raster order."""
        self.end_call()  # after Ctrl-C, the end of the last call may have been skipped
        self.call, self.order = call, order
        if order is not None:
            self.index = order.gather.expand(call.hidden_states.shape[0], -1)

    def end_call(self) -> None:
        """End the call."""
        self.call: Call = None  # type: ignore[assignment]
        self.order = None
        self.index: Tensor | None = None
        self._kept: dict[str, Any] = {}

    def take(self, x: Tensor) -> Tensor:
        # A tensor with one row for all rows keeps one row.
        return x if self.order is None else self.order.apply(x)

    def fill(self, x: Tensor) -> Tensor:
        return x if self.order is None else self.order.undo(x)

    def place(self, layout: str, length: int, offsets: list[int]) -> Tensor | None:
        if self.index is None:
            return None
        return joint_index(self.index, self.index.shape[1], length, offsets)
