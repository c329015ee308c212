"""Metric values: a number, its sample size, its 95 % interval and the network behind it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from dit_accel.eval.results.types import Extractor, MetricValue

DRAWS = 2000
PARTS = ("all", "shape", "colour", "motion", "background")
"""Properties that the demo's judge checks."""
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
    interval_95: list[float] | None = None,
    extractor: Extractor | None = None,
    **extras: Any,
) -> MetricValue:
    """Return the record of a metric's value.

    Args:
        value: finite number; None with the reason in `why`.
        extras: further fields, such as `flags`, `infinite`, `truncated`.
    """
    if value is not None and not math.isfinite(value):
        raise ValueError(f"value={value}: must be a finite number")
    known = dict(value=value, n=n, interval_95=interval_95, unit=unit, extractor=extractor)
    return cast(MetricValue, {**known, **extras})


def mean_value(
    values: Sequence[float], unit: str, extractor: Extractor | None = None, **extras: Any
) -> MetricValue:
    """Return the mean with its bootstrap interval.

    Infinite values (PSNR of identical pairs) are left out of the mean. `infinite` and `n` count them.
    """
    sample = np.asarray(values, np.float64)
    finite = sample[~np.isinf(sample)]
    if len(finite) < len(sample):
        extras["infinite"] = len(sample) - len(finite)
    extras |= {"n": len(sample), "unit": unit, "extractor": extractor}
    if not len(finite):
        why = "all pairs are identical" if len(sample) else "there are no values"
        return metric_value(None, why=why, **extras)
    return metric_value(float(finite.mean()), interval_95=bootstrap_interval(finite), **extras)


def share_value(right: int, n: int, **extras: Any) -> MetricValue:
    """Return the share `right / n` with Wilson's interval, which also holds near 0 and 1."""
    from scipy.stats import binomtest

    return metric_value(
        right / n,
        n,
        "share",
        interval_95=[float(x) for x in binomtest(right, n).proportion_ci(method="wilson")],
        **extras,
    )


def judge_values(values: Mapping[str, Mapping[str, float]]) -> dict[str, MetricValue]:
    """Return `judge` (everything right), `judge_shape` and so on, each over the samples that it applies to.

    Args:
        values: 1 or 0 by "judge_all", "judge_shape" and so on, then by sample id.
    """
    out = {}
    for part in PARTS:
        if single := dict(sorted(values.get(f"judge_{part}", {}).items())):
            name = "judge" if part == "all" else f"judge_{part}"
            out[name] = share_value(round(sum(single.values())), len(single), values=single)
    return out
