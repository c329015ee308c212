"""`ContextState`: what is cached for one context, and when each of its tokens was last updated."""

from collections.abc import Hashable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.kernels import LinearState
from dit_accel.ras.history import History
from dit_accel.ras.predictor import extrapolation_factor


class ContextState:
    """Outputs, keys and values, exact extras, and noise levels of one context.

    Args:
        geometry: what the caches fit; a call of another geometry needs a new state.
        epoch: see `Call.epoch`.
    """

    def __init__(self, geometry: tuple, epoch: Hashable) -> None:
        self.geometry = geometry
        self.epoch = epoch
        self.output: History | None = None
        self.kv: dict[str, tuple[History, History]] = {}
        self.totals: dict[str, LinearState] = {}
        self.extras: dict[str, Any] = {}
        self._last: Tensor | None = None
        self._previous: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Keys and values."""
        return sum(x.nbytes for pair in self.kv.values() for x in pair)

    def begin(
        self, sigma: Float[Tensor, ""], index: Int[Tensor, "r n"] | None, shape: tuple[int, int]
    ) -> tuple[Float[Tensor, "r t"], Float[Tensor, "r t"]]:
        """A call at this noise level updates the tokens `index` of `shape` (rows, tokens).

        Returns:
            How far each token's line has to be followed, and 1 for tokens whose last update had this
            very noise level, else 0.
        """
        if self._last is None or self._previous is None:
            self._last = sigma.expand(shape).clone()
            self._previous = self._last.clone()
            return torch.zeros_like(self._last), torch.zeros_like(self._last)
        factor = extrapolation_factor(sigma, self._last, self._previous)
        same = self._last == sigma
        moved = torch.where(same, self._previous, self._last)
        if index is None:
            self._previous, self._last = moved, sigma.expand(shape).clone()
        else:
            self._previous.scatter_(1, index, moved.gather(1, index))
            self._last.scatter_(1, index, sigma.expand(index.shape))
        return factor, same.float()
