"""Decides step by step, from measured errors, whether the transformer has to run, and on how many tokens."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LONGEST, LONGEST_FROM_31 = 1, 3
"""Most steps in a row that are not dense, below 31 steps and from there on."""


def longest(steps: int) -> int:
    """Return the most steps in a row of a run that are not dense."""
    return LONGEST_FROM_31 if steps > 30 else LONGEST


def fewest_tiles(
    errors: Float[Tensor, "s m"],
    rank: Int[Tensor, "s m"],
    choices: tuple[int, ...],
    tolerance: float,
) -> int | None:
    """Return the fewest tiles that leave no more than the tolerance in every sample. None: all of them have to run.

    One number is read from the device.

    Args:
        errors: squared error of each tile if it does not run, over the mean square of all.
        rank: place of each tile among those that are to run.
        choices: accepted numbers, rising.
        tolerance: root of the mean over tiles that do not run, those that run counting as 0.
    """
    order = rank.argsort(dim=1)
    ranked = errors.gather(1, order)
    left = torch.stack([ranked[:, n:].sum(1) / errors.shape[1] for n in choices])
    fits = (left.sqrt() <= tolerance).all(1)
    # The first that fits; one past the end if there is none.
    first = torch.cat([fits, fits.new_ones(1)]).int().argmax()
    return (*choices, None)[int(first)]


class ErrorControl:
    """Runs the transformer where the predicted error of a forecast is above a tolerance: on all tokens, or not at all.

    The relative error of the last forecast of each sample, over the difference of noise levels that it spanned, is
    measured whenever the transformer runs. The prediction is that rate times the difference now, times the step's
    weight (`step_weights`). Each sample is decided for alone, so that a batch gives what single runs give; the call runs
    if one of them needs it. One number is read from the device in each step.

    Args:
        tolerance: `RASConfig.control`.
        weights: of the steps.
        samples: rows of the run's first call.
        device: of the latents.
    """

    def __init__(
        self, tolerance: float, weights: list[float], samples: int, device: torch.device
    ) -> None:
        self.tolerance = tolerance
        self.weights = weights
        self.longest = longest(len(weights))
        self.rate = torch.full((samples,), math.inf, dtype=torch.float64, device=device)
        """Squared relative error over the square of the noise level difference, summed over contexts."""
        self.updated = torch.zeros(samples, dtype=torch.float64, device=device)
        """Noise level of each sample's last update."""
        self.left_out = torch.zeros(samples, dtype=torch.long, device=device)
        """Steps since."""
        self.step = -1
        self.runs: Tensor | None = None
        """Samples that need the transformer in this step, `[S]`; None: all."""
        self.any = True
        self._measured = -1

    def begin_step(self, step: int, level: Float[Tensor, ""], *, dense: bool) -> None:
        """Decide for this step, unless a call of it has come before.

        Args:
            step: index of the step.
            level: noise level of the step.
            dense: whether the schedule makes the step dense.
        """
        if step == self.step:
            return
        self.step = step
        if dense:
            self.runs, self.any = None, True
            self.updated.copy_(level.expand_as(self.updated))
            self.left_out.zero_()
            return
        predicted = self.rate.sqrt() * (self.updated - level).abs() * self.weights[step]
        self.runs = (predicted > self.tolerance) | (self.left_out >= self.longest)
        self.any = bool(self.runs.any())
        self.updated = torch.where(self.runs, level.double(), self.updated)
        self.left_out = torch.where(self.runs, 0, self.left_out + 1)

    def measure(self, rates: Float[Tensor, " r"], known: Bool[Tensor, " r"]) -> None:
        """Take in squared errors of a call's rows, see `rate`.

        Args:
            rates: of a context, rows being samples or several rows for each of them.
            known: rows that were measured.
        """
        samples = len(self.rate)
        if len(rates) % samples == 0:
            rates = rates.unflatten(0, (-1, samples)).sum(0)
            known = known.unflatten(0, (-1, samples)).any(0)
        else:
            rates, known = (x.repeat(samples // len(x)) for x in (rates, known))
        before = self.rate if self._measured == self.step else torch.zeros_like(self.rate)
        self._measured = self.step
        self.rate = torch.where(known, before + rates, self.rate)
