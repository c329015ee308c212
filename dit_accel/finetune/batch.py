"""`Batch`: clean latents with the conditions that the transformer takes beside them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Samples of one size."""

    latents: Tensor
    """`[B, C, (F,) H, W]`, clean, normalised as the transformer takes them, fp32."""
    conditions: dict[str, Tensor]
    """One row for each sample, `[B, ...]`; the keys are keyword arguments of the transformer."""
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device."""
        conditions = {name: x.to(device) for name, x in self.conditions.items()}
        return Batch(self.latents.to(device), conditions, self.ids)
