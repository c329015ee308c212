"""`Rotation`: applies RoPE (arXiv 2104.09864) to keys and removes it."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from dit_accel.kernels.lut_attention import factors

LEAST = 4096
"""Smallest number of positions in the table of factors."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotation of keys by their positions. Channels i and i + d / 2 form a pair."""

    frequencies: Float[Tensor, " half"]
    """Rotation angle per position in radians, for each pair of channels."""
    _table: list[Tensor] = field(default_factory=list, init=False, repr=False)
    """Cached factors of the first positions (CPU only), because computing them per call takes longer than reading the keys."""

    def turned(
        self, x: Float[Tensor, "b h n d"], positions: Int[Tensor, "b _h n"]
    ) -> Float[Tensor, "b h n d"]:
        """Return keys after RoPE, in fp32."""
        return _times(x, self.factors(positions))

    def unturned(
        self, x: Float[Tensor, "b h n d"], positions: Int[Tensor, "b _h n"]
    ) -> Float[Tensor, "b h n d"]:
        """Return keys before RoPE, in fp32."""
        return _times(x, self.factors(positions).conj())

    def factors(self, positions: Int[Tensor, "b _h n"]) -> Complex[Tensor, "b _h n half"]:
        """Return the complex factors that multiply the pairs of channels."""
        if positions.device.type != "cpu":
            return self._computed(positions)
        needed = int(positions.max()) + 1 if positions.numel() else 0
        if not self._table or len(self._table[0]) < needed:
            count = max(LEAST, 2 ** (needed - 1).bit_length())
            self._table[:] = [self._computed(torch.arange(count))]
        found = self._table[0].index_select(0, positions.flatten())
        return found.unflatten(0, positions.shape)

    def _computed(self, positions: Tensor) -> Tensor:
        return factors(positions, self.frequencies).to(torch.complex64)


def _times(x: Tensor, factors: Tensor) -> Tensor:
    pairs = torch.complex(*x.float().chunk(2, -1)) * factors
    return torch.cat([pairs.real, pairs.imag], -1)
