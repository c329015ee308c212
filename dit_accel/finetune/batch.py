"""`Batch`: clean latents and text conditions of several training samples."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Training samples of equal size."""

    latents: Tensor
    """Clean latents `[B, C, (F,) H, W]` in fp32, normalised as the transformer expects them."""
    conditions: dict[str, Tensor]
    """Conditions `[B, ...]` by keyword argument of the transformer."""
    ids: tuple[str, ...]
    """Names of the samples."""

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> "Batch":
        """Return a copy of the batch on another device."""
        conditions = {name: x.to(device) for name, x in self.conditions.items()}
        return Batch(self.latents.to(device), conditions, self.ids)
