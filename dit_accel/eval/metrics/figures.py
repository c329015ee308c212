"""Figures: a value, how many samples it rests on, its interval, and the network behind it."""

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from dit_accel.eval.results.types import Extractor, Figure

DRAWS = 2000
_AT_ONCE = 1 << 19  # values drawn at a time


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, *, draws: int = DRAWS, seed: int = 0
) -> list[float] | None:
    """95 % percentile interval of the mean; None for fewer than two values.

    The same values in the same order give the same interval.
    """
    sample = np.asarray(values, np.float64)
    if len(sample) < 2:
        return None
    rng = np.random.default_rng(seed)
    rows = max(1, _AT_ONCE // len(sample))
    means = [
        sample[rng.integers(len(sample), size=(min(rows, draws - i), len(sample)))].mean(1)
        for i in range(0, draws, rows)
    ]
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return [float(low), float(high)]


def figure(
    value: float,
    n: int,
    unit: str,
    *,
    interval_95: Sequence[float] | None = None,
    extractor: Extractor | None = None,
    **extras: Any,
) -> Figure:
    """A figure whose value is known.

    Args:
        value: finite.
        extras: what else a reader must know, such as `flags`, `infinite`, `truncated`.
    """
    if not math.isfinite(value):
        raise ValueError(f"value={value}: accepted is a finite number")
    interval = None if interval_95 is None else [float(x) for x in interval_95]
    known = {
        "value": float(value),
        "n": n,
        "interval_95": interval,
        "unit": unit,
        "extractor": extractor,
    }
    return cast(Figure, {**known, **extras})


def missing_figure(
    why: str, unit: str, *, n: int = 0, extractor: Extractor | None = None, **extras: Any
) -> Figure:
    """A figure without a value, and the reason."""
    known = {"value": None, "n": n, "interval_95": None, "unit": unit, "extractor": extractor}
    return cast(Figure, {**known, "why": why, **extras})


def mean_figure(
    values: Sequence[float] | np.ndarray,
    unit: str,
    extractor: Extractor | None = None,
    **extras: Any,
) -> Figure:
    """The mean with its bootstrap interval.

    Infinite values (PSNR of identical pairs) cannot enter a mean: they are counted in `infinite`,
    and `n` counts them too.

    Raises:
        ValueError: a value is NaN.
    """
    sample = np.asarray(values, np.float64)
    if np.isnan(sample).any():
        raise ValueError(
            f"values: {int(np.isnan(sample).sum())} of {len(sample)} are NaN; accepted are numbers"
        )
    finite = sample[np.isfinite(sample)]
    if len(finite) < len(sample):
        extras["infinite"] = len(sample) - len(finite)
    if not len(finite):
        why = "all pairs are identical" if len(sample) else "there is nothing to average"
        return missing_figure(why, unit, n=len(sample), extractor=extractor, **extras)
    return figure(
        float(finite.mean()),
        len(sample),
        unit,
        interval_95=bootstrap_interval(finite),
        extractor=extractor,
        **extras,
    )


def share_figure(right: int, n: int, **extras: Any) -> Figure:
    """A share with Wilson's interval, which also holds near 0 and 1."""
    from dit_accel.demo.report import wilson_interval

    return figure(right / n, n, "share", interval_95=wilson_interval(right, n), **extras)
