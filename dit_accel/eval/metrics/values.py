"""Metric values: a number, its sample size, its 95 % interval and the network behind it."""

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from dit_accel.eval.results.types import Extractor, MetricValue

DRAWS = 2000
_AT_ONCE = 1 << 19  # values drawn at a time; changing it changes the draws of large samples


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, *, draws: int = DRAWS, seed: int = 0
) -> list[float] | None:
    """Return the 95 % percentile interval of the mean, or None for fewer than two values.

    The same values in the same order give the same interval.
    """
    from scipy.stats import bootstrap

    sample = np.asarray(values, np.float64)
    if len(sample) < 2:
        return None
    found = bootstrap(
        (sample,),
        np.mean,
        n_resamples=draws,
        batch=max(1, _AT_ONCE // len(sample)),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return [float(found.low), float(found.high)]


def metric_value(
    value: float | None,
    n: int,
    unit: str,
    *,
    interval_95: Sequence[float] | None = None,
    extractor: Extractor | None = None,
    **extras: Any,
) -> MetricValue:
    """Return the record of a metric's value.

    Args:
        value: finite number; None with the reason in `why`.
        extras: further fields of the record, such as `flags`, `infinite`, `truncated`.

    Raises:
        ValueError: `value` is NaN or infinite.
    """
    if value is not None and not math.isfinite(value):
        raise ValueError(f"value={value}: accepted is a finite number")
    known = {
        "value": None if value is None else float(value),
        "n": n,
        "interval_95": None if interval_95 is None else [float(x) for x in interval_95],
        "unit": unit,
        "extractor": extractor,
    }
    return cast(MetricValue, {**known, **extras})


def mean_value(
    values: Sequence[float] | np.ndarray,
    unit: str,
    extractor: Extractor | None = None,
    **extras: Any,
) -> MetricValue:
    """Return the mean with its bootstrap interval.

    Infinite values (PSNR of identical pairs) are left out of the mean. `infinite` and `n` count them.

    Raises:
        ValueError: a value is NaN.
    """
    sample = np.asarray(values, np.float64)
    finite = sample[~np.isinf(sample)]
    mean, interval = None, None
    if len(finite):
        mean, interval = float(finite.mean()), bootstrap_interval(finite)
    else:
        extras["why"] = "all pairs are identical" if len(sample) else "there are no values"
    if len(finite) < len(sample):
        extras["infinite"] = len(sample) - len(finite)
    return metric_value(
        mean, len(sample), unit, interval_95=interval, extractor=extractor, **extras
    )


def share_value(right: int, n: int) -> MetricValue:
    """Return the share `right / n` with Wilson's interval, which also holds near 0 and 1."""
    from dit_accel.demo.report import wilson_interval

    return metric_value(right / n, n, "share", interval_95=wilson_interval(right, n))
