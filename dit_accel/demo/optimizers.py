"""Muon for the matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

_MIN_SIDE = 8  # a matrix with fewer rows or columns has little to orthogonalise


class MatrixMuon(torch.optim.Muon):
    """torch's Muon, which takes 2-D parameters only, also for convolution kernels.

    A kernel counts as a matrix of output channel by everything else: the optimizer holds a 2-D
    parameter over the same memory, and looks at the kernel's own gradient at each step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        self._originals = list(parameters)
        self._matrices = [
            p if p.ndim == 2 else nn.Parameter(p.data.view(len(p), -1)) for p in self._originals
        ]
        super().__init__(self._matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for original, matrix in zip(self._originals, self._matrices, strict=True):
            if original is not matrix and original.grad is not None:
                matrix.grad = original.grad.flatten(1)
        super().step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none=True)
        for original in self._originals:
            original.grad = None


def muon_and_adamw(
    matrices: Iterable[nn.Parameter],
    all_parameters: Iterable[nn.Parameter],
    muon_rate: float,
    adamw_rate: float,
) -> dict[str, torch.optim.Optimizer]:
    """The two optimizers, by name. `matrices` that are too narrow go to AdamW with everything else."""
    chosen = [p for p in matrices if p.ndim >= 2 and min(len(p), p[0].numel()) >= _MIN_SIDE]
    ids = {id(p) for p in chosen}
    others = [p for p in all_parameters if id(p) not in ids]
    return {
        "muon": MatrixMuon(chosen, lr=muon_rate),
        "adamw": torch.optim.AdamW(others, lr=adamw_rate, betas=(0.9, 0.98), weight_decay=0.0),
    }


def muon_for_all(module: nn.Module, learning_rate: float) -> dict[str, torch.optim.Optimizer]:
    """The two optimizers for a convolutional module: Muon wherever it can be, one learning rate."""
    parameters = list(module.parameters())
    return muon_and_adamw(parameters, parameters, learning_rate, learning_rate)
