"""Metric values: means, their intervals, and infinite values."""

import json
import math

import numpy as np
import pytest

from dit_accel.eval.metrics.values import (
    bootstrap_interval,
    mean_value,
    metric_value,
    share_value,
)


def test_interval_covers_the_mean_as_often_as_it_says(rng):
    hits = 0
    for i in range(100):
        low, high = bootstrap_interval(rng.normal(3.0, 1.0, 50), seed=i)
        hits += low <= 3.0 <= high
    assert 88 <= hits <= 99


def test_interval_is_the_percentile_bootstrap(rng):
    """The draws are those of numpy's default generator of seed 0, which fixes published intervals."""
    values = rng.exponential(size=100)
    drawn = np.random.default_rng(0).integers(100, size=(2000, 100))
    expected = np.percentile(values[drawn].mean(1), (2.5, 97.5))
    assert bootstrap_interval(values) == pytest.approx(list(expected), rel=1e-12)


def test_interval_is_the_same_each_time_and_in_pieces(rng, monkeypatch):
    values = rng.normal(size=100)
    whole = bootstrap_interval(values)
    assert bootstrap_interval(values) == whole
    monkeypatch.setattr("dit_accel.eval.metrics.values._AT_ONCE", 1000)
    assert bootstrap_interval(values) == pytest.approx(whole, abs=0.02)


def test_one_value_has_no_interval():
    assert mean_value([2.0], "dB")["interval_95"] is None


def test_infinite_values_are_counted():
    found = mean_value([30.0, math.inf, 40.0], "dB")
    assert (found["value"], found["n"], found["infinite"]) == (35.0, 3, 1)


def test_only_infinite_values_have_no_mean():
    found = mean_value([math.inf, math.inf], "dB")
    assert found["value"] is None
    assert (found["n"], found["infinite"]) == (2, 2)
    assert "identical" in found["why"]
    json.dumps(found, allow_nan=False)


def test_no_values_have_no_mean():
    assert "no values" in mean_value([], "dB")["why"]


def test_nan_is_refused():
    with pytest.raises(ValueError, match="value=nan"):
        mean_value([1.0, math.nan], "dB")
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"value={value}"):
            metric_value(value, 1, "dB")


def test_share_has_wilsons_interval():
    from scipy.stats import binomtest

    found = share_value(18, 20)
    theirs = binomtest(18, 20).proportion_ci(0.95, method="wilson")
    assert found["value"] == 0.9
    assert found["interval_95"] == pytest.approx([theirs.low, theirs.high], abs=1e-4)
