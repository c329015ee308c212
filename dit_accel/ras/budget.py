"""`least_error`: the dense, partial and forecast steps of a run that leave the least predicted error for a budget."""

import math
from collections.abc import Collection, Sequence
from functools import cache
from itertools import pairwise
from typing import Literal

import numpy as np

Kind = Literal["dense", "partial", "forecast"]
LONGEST = 16
"""Steps from one dense step to the next, unless the budget asks for more."""
UNITS = 24
"""Parts of a dense step in which costs of partial steps are counted, rounded up."""


def step_intervals(levels: Sequence[float]) -> list[float]:
    """Return |s_(k+1) - s_k| of each step.

    Where neighbouring steps have the same noise level, they are calls of one solver step (Heun), and each counts for
    half of the interval on either side.

    Args:
        levels: noise levels in [0, 1] of the steps and of the end.
    """
    gaps = [abs(b - a) for a, b in pairwise(levels)]
    if 0 in gaps[:-1]:
        gaps = [(a + b) / 2 for a, b in zip([0.0, *gaps[:-1]], gaps, strict=True)]
    return gaps


def step_weights(levels: Sequence[float]) -> list[float]:
    """Return how much an error of each step's output counts in the end: |s_(k+1) - s_k| / (1 - s_k).

    That is the step in units of the signal that is there. It follows the growth of errors that was measured on a
    trained model, without a fitted number.
    """
    gaps = step_intervals(levels)
    return [gap / max(1 - s, 1e-3) for gap, s in zip(gaps, levels, strict=False)]


def error_left(share: float) -> float:
    """Return the share of the squared forecast error that is left after a partial step.

    Measured after dense steps, tokens chosen by their last error: about .67 with an eighth of the tokens, .45 with a
    quarter, .24 with a half, on two trained models.
    """
    return float(np.interp(share, [0, 0.125, 0.25, 0.5, 1], [1, 0.67, 0.45, 0.24, 0]))


def least_error(
    levels: Sequence[float],
    budget: float | int,
    dense: Collection[int],
    partial: Sequence[tuple[float, float] | None],
) -> list[Kind]:
    """Return what each step of a run is.

    The predicted error is the sum over steps k that are not dense of (w_k (k - a))^2, a being the last dense step and
    w the `step_weights`. A partial step leaves `error_left` of its own error; on later steps that share of the error
    still counts from a, the rest from the partial step. There is at most one partial step between two dense ones,
    because errors of kept keys and values feed the tokens that run. The minimum is found by dynamic programming over
    dense steps and cost.

    Args:
        levels: noise levels in [0, 1] of the steps and of the end.
        budget: cost of the run, in dense steps.
        dense: steps that are dense in any case; the first one is always.
        partial: share of the tokens and cost of each step if it is partial; None where it must not be.

    Raises:
        ValueError: `levels` are not one more than the steps.
    """
    steps = len(partial)
    if len(levels) != steps + 1:
        raise ValueError(f"levels: {len(levels)} numbers for {steps} steps; accepted is one more")
    if budget >= steps:
        return ["dense"] * steps
    weights = step_weights(levels)
    forced = sorted({0, *dense})
    units = UNITS if any(x is not None for x in partial) else 1
    size = max(math.floor(budget * units + 1e-6), len(forced) * units)
    longest = max(LONGEST, math.ceil(2 * steps / max(1, size // units)))

    @cache
    def between(start: int, end: int) -> list[tuple[int, float, int | None]]:
        """Cost in units, error and partial step of the ways from one dense step to the next."""
        errors = [(weights[k] * (k - start)) ** 2 for k in range(start + 1, end)]
        ways: list[tuple[int, float, int | None]] = [(0, sum(errors, 0.0), None)]
        for i, k in enumerate(range(start + 1, end)):
            if (choice := partial[k]) is None:
                continue
            share, cost = choice
            left = error_left(share)
            after = [
                left * errors[j] + (1 - left) * (weights[start + 1 + j] * (j - i)) ** 2
                for j in range(i, len(errors))
            ]
            ways.append((math.ceil(cost * units - 1e-6), sum(errors[:i], 0.0) + sum(after), k))
        return ways

    # best[b][x]: least error up to the dense step b at a cost of at most x units; the end is one more dense step.
    best = np.full((steps + 1, size + 1), np.inf)
    came: list[dict[int, tuple[int, int, int | None]]] = [{} for _ in range(steps + 1)]
    best[0, units:] = 0.0
    for end in range(1, steps + 1):
        price = units if end < steps else 0
        nearest = max(k for k in forced if k < end)
        for start in range(end - 1, max(nearest, end - longest) - 1, -1):
            for cost, error, where in between(start, end):
                paid = price + cost
                if paid > size:
                    continue
                candidate = best[start, : size + 1 - paid] + error
                better = candidate < best[end, paid:]
                if not better.any():
                    continue
                best[end, paid:][better] = candidate[better]
                for x in (better.nonzero()[0] + paid).tolist():
                    came[end][x] = (start, x - paid, where)
    kinds: list[Kind] = ["forecast"] * steps
    at, x = steps, size
    while at > 0:
        at, x, where = came[at][x]
        kinds[at] = "dense"
        if where is not None:
            kinds[where] = "partial"
    return kinds
