"""Token orders: which latent tokens share a block."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from dit_accel.models import AllTokens, Call, TokenOrder, joint_index


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept may serve a call with gradients next
def tile_order(
    grid: tuple[int, int, int], tile: tuple[int, int, int], device: torch.device
) -> TokenOrder:
    """Tiles of shape `tile` over a latent grid `(t, h, w)`, one after the other without gaps.

    Tiles follow each other in raster order, and so do the tokens within a tile. Tiles at the far edges
    may be smaller; the blocks that follow then begin inside a tile. Padding smaller tiles instead was
    measured to find less of the attention's mass, with more blocks to compute.
    """
    counts = [math.ceil(n / size) for n, size in zip(grid, tile, strict=True)]
    t, h, w = (torch.arange(n) // size for n, size in zip(grid, tile, strict=True))
    owner = ((t[:, None, None] * counts[1] + h[:, None]) * counts[2] + w).flatten()
    gather = torch.argsort(owner, stable=True)
    return TokenOrder(gather.to(device), gather.argsort().to(device))


class Reordered(AllTokens):
    """TokenSelection on all tokens in another order."""

    order: TokenOrder | None

    def __init__(self) -> None:
        self.end_call()

    def begin_call(self, call: Call, order: TokenOrder | None) -> None:
        """The transformer is about to be called on tokens in this order; None: raster."""
        self.end_call()  # Ctrl-C in the middle of a call skips the hook that ends it
        self.call, self.order = call, order
        if order is not None:
            self.index = order.gather.expand(call.hidden_states.shape[0], -1)

    def end_call(self) -> None:
        """Forget the call."""
        self.call: Call = None  # type: ignore[assignment]
        self.order = None
        self.index: Tensor | None = None
        self._kept: dict[str, Any] = {}

    def take(self, x: Tensor) -> Tensor:
        # What is the same for all rows stays one row.
        return x if self.order is None else self.order.apply(x)

    def fill(self, x: Tensor) -> Tensor:
        return x if self.order is None else self.order.undo(x)

    def place(self, layout: str, length: int, offsets: list[int]) -> Tensor | None:
        if self.index is None:
            return None
        return joint_index(self.index, self.index.shape[1], length, offsets)
