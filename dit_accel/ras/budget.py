"""`least_error`: choice of dense, partial and forecast steps with the least predicted error for a budget."""

import math
from collections.abc import Collection, Sequence
from functools import cache
from itertools import pairwise
from typing import Literal

import numpy as np

Kind = Literal["dense", "partial", "forecast"]
LONGEST = 16
"""Most steps from one dense step to the next, unless the budget requires more."""
UNITS = 24
"""Units of cost in a dense step. Costs of partial steps are rounded up to units."""


def step_intervals(levels: Sequence[float]) -> list[float]:
    """Return |s_(k+1) - s_k| of each step.

    Neighbouring steps with the same noise level are calls of one solver step (Heun). Each counts for half of the
    intervals before and after it.

    Args:
        levels: noise levels in [0, 1] of the steps and of the end.
    """
    gaps = [abs(b - a) for a, b in pairwise(levels)]
    if 0 in gaps[:-1]:
        gaps = [(a + b) / 2 for a, b in zip([0.0, *gaps[:-1]], gaps, strict=True)]
    return gaps


def step_weights(levels: Sequence[float]) -> list[float]:
    """Return the weight of an error of each step's output in the result: |s_(k+1) - s_k| / (1 - s_k).

    This is the length of the step relative to the share of signal. It follows the growth of errors measured on a trained
    model, without a fitted constant.
    """
    gaps = step_intervals(levels)
    return [gap / max(1 - s, 1e-3) for gap, s in zip(gaps, levels, strict=False)]


def error_left(share: float) -> float:
    """Return the share of the squared forecast error that remains after a partial step.

    Interpolated from measurements on two trained models, after dense steps, with tokens chosen by their last error:
    about .67 with an eighth of the tokens, .45 with a quarter, .24 with a half.
    """
    return float(np.interp(share, [0, 0.125, 0.25, 0.5, 1], [1, 0.67, 0.45, 0.24, 0]))


def least_error(
    levels: Sequence[float],
    budget: float | int,
    dense: Collection[int],
    partial: Sequence[tuple[float, float] | None],
) -> list[Kind]:
    """Return the kind of each step of a run.

    The predicted error is the sum of (w_k (k - a))^2 over all steps k that are not dense. a is the last dense step before
    k, and w are the `step_weights`. A partial step leaves `error_left` of its own error. In later steps this share of
    the error counts from a, and the rest counts from the partial step. There is at most one partial step between two
    dense steps, because errors of cached keys and values affect the tokens that run. The minimum is found by dynamic
    programming over dense steps and cost.

    Args:
        levels: noise levels in [0, 1] of the steps and of the end.
        budget: cost of the run, in dense steps.
        dense: steps that are always dense. The first step always is.
        partial: (share of the tokens, cost) of each step if it is partial; None if it must not be partial.

    Raises:
        ValueError: the number of levels is not the number of steps plus one.
    """
    steps = len(partial)
    if len(levels) != steps + 1:
        raise ValueError(
            f"levels: {len(levels)} numbers for {steps} steps; accepted are {steps + 1}"
        )
    if budget >= steps:
        return ["dense"] * steps
    weights = step_weights(levels)
    forced = sorted({0, *dense})
    units = UNITS if any(x is not None for x in partial) else 1
    size = max(math.floor(budget * units + 1e-6), len(forced) * units)
    longest = max(LONGEST, math.ceil(2 * steps / max(1, size // units)))

    @cache
    def between(start: int, end: int) -> list[tuple[int, float, int | None]]:
        """Return (cost in units, error, partial step) of each way from one dense step to the next."""
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

    # best[b][x]: least error up to the dense step b at a cost of at most x units. The end counts as a dense step.
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
