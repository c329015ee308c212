"""`ContextState`: caches of one context, and the noise levels at which its tokens were updated."""

from collections.abc import Hashable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dit_accel.kernels import LinearState
from dit_accel.ras.history import History
from dit_accel.ras.outputs import Outputs
from dit_accel.ras.predictor import Distance, extrapolation_factor


class ContextState:
    """Outputs, keys and values, exact extras, and noise levels of one context.

    Args:
        geometry: shapes, dtype and device of the calls. A call of another geometry needs a new state.
        epoch: see `Call.epoch`.
    """

    def __init__(self, geometry: tuple, epoch: Hashable) -> None:
        self.geometry = geometry
        self.epoch = epoch
        self.outputs: Outputs | None = None
        self.returned: Any = None
        """Structure of the transformer's last return value (`Form`), in which forecasts are returned."""
        self.kv: dict[str, tuple[History, History]] = {}
        self.totals: dict[str, LinearState] = {}
        self.extras: dict[str, Any] = {}
        self._last: Tensor | None = None
        self._previous: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the cached keys and values."""
        return sum(x.nbytes for pair in self.kv.values() for x in pair)

    def distance(self, sigma: Float[Tensor, ""], shape: tuple[int, int]) -> Distance:
        """Return the distance of a noise level to the last updates of the tokens; `shape` is (rows, n)."""
        if self._last is None or self._previous is None:
            none = sigma.new_zeros(shape)
            return Distance(none, none, none)
        return Distance(
            extrapolation_factor(sigma, self._last, self._previous),
            (self._last == sigma).float(),
            (sigma - self._last).abs(),
        )

    def begin(
        self,
        sigma: Float[Tensor, ""],
        index: Int[Tensor, "r m"] | None,
        shape: tuple[int, int],
        rows: Bool[Tensor, "r 1"] | None = None,
    ) -> Distance:
        """Record that a call updates tokens.

        Args:
            sigma: noise level of the call.
            index: tokens that are updated; None: all.
            shape: number of rows, and number of tokens in a row (1 if all are updated together).
            rows: rows that are updated; None: all.

        Returns:
            Distance of the call to the updates before.
        """
        distance = self.distance(sigma, shape)
        if self._last is None or self._previous is None:
            self._last = sigma.expand(shape).clone()
            self._previous = self._last.clone()
            return distance
        moved = torch.where(distance.same.bool(), self._previous, self._last)
        if rows is not None:
            self._previous = torch.where(rows, moved, self._previous)
            self._last = torch.where(rows, sigma, self._last)
        elif index is None:
            self._previous, self._last = moved, sigma.expand(shape).clone()
        else:
            self._previous.scatter_(1, index, moved.gather(1, index))
            self._last.scatter_(1, index, sigma.expand(index.shape))
        return distance
