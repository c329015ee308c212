"""Error control: decides in each step, from measured errors, whether the transformer runs and on how many tokens."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LONGEST, LONGEST_FROM_31 = 1, 3
"""Most consecutive steps that are not dense, in runs of up to 30 steps and of more steps."""


def longest(steps: int) -> int:
    """Return the largest number of consecutive steps that are not dense, for a run of `steps` steps."""
    return LONGEST_FROM_31 if steps > 30 else LONGEST


def fewest_tiles(
    errors: Float[Tensor, "s m"],
    rank: Int[Tensor, "s m"],
    choices: tuple[int, ...],
    tolerance: float,
) -> int | None:
    """Return the smallest number of tiles whose remaining error is within the tolerance in every sample.

    None if all tiles have to run. One number is read from the device.

    Args:
        errors: squared error of each tile if it does not run, divided by the mean square of the output.
        rank: rank of each tile; tiles with the lowest ranks run.
        choices: accepted numbers of tiles, ascending.
        tolerance: largest accepted root mean square error over all tiles. Tiles that run have no error.
    """
    order = rank.argsort(dim=1)
    ranked = errors.gather(1, order)
    left = torch.stack([ranked[:, n:].sum(1) / errors.shape[1] for n in choices])
    fits = (left.sqrt() <= tolerance).all(1)
    # Index of the first choice that fits; one past the end if none does.
    first = torch.cat([fits, fits.new_ones(1)]).int().argmax()
    return (*choices, None)[int(first)]


class ErrorControl:
    """Error control of runs without partial steps: the transformer runs if a forecast would exceed a tolerance.

    Whenever the transformer runs, the relative error of the forecast is measured for each sample, and divided by the
    difference of noise levels that the forecast spanned. The predicted error is this rate times the present difference,
    times the weight of the step (`step_weights`). The decision is made for each sample, so that a batch gives the
    results of single runs. The call runs if one sample needs it. One number is read from the device in each step.

    Args:
        tolerance: `RASConfig.control`.
        weights: weights of the steps.
        samples: number of rows of the run's first call.
        device: device of the latents.
    """

    def __init__(
        self, tolerance: float, weights: list[float], samples: int, device: torch.device
    ) -> None:
        self.tolerance = tolerance
        self.weights = weights
        self.longest = longest(len(weights))
        self.rate = torch.full((samples,), math.inf, dtype=torch.float64, device=device)
        """Squared relative error divided by the squared difference of noise levels, summed over contexts."""
        self.updated = torch.zeros(samples, dtype=torch.float64, device=device)
        """Noise level of each sample's last update."""
        self.left_out = torch.zeros(samples, dtype=torch.long, device=device)
        """Number of steps since each sample's last update."""
        self.step = -1
        self.runs: Tensor | None = None
        """Samples that need the transformer in this step, bool `[S]`; None: all."""
        self.any = True
        """True if a sample needs the transformer in this step."""
        self._measured = -1

    def begin_step(self, step: int, level: Float[Tensor, ""], *, dense: bool) -> None:
        """Decide about a step. Later calls of the same step do nothing.

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
        """Record the measured rates of a call.

        Args:
            rates: rates of one context as in `rate`; rows are samples, or several rows for each sample.
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
