"""Figures: means, their intervals, and what cannot be averaged."""

import json
import math

import numpy as np
import pytest

from dit_accel.eval.metrics.figures import bootstrap_interval, figure, mean_figure, share_figure


def test_interval_covers_the_mean_as_often_as_it_says(rng):
    hits = 0
    for i in range(100):
        low, high = bootstrap_interval(rng.normal(3.0, 1.0, 50), seed=i)
        hits += low <= 3.0 <= high
    assert 88 <= hits <= 99


def test_interval_matches_the_one_of_scipy(rng):
    from scipy.stats import bootstrap

    values = rng.exponential(size=400)
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=rng)
    ours = bootstrap_interval(values)
    assert ours == pytest.approx(list(theirs.confidence_interval), abs=0.015)


def test_interval_is_the_same_each_time_and_in_pieces(rng, monkeypatch):
    values = rng.normal(size=100)
    whole = bootstrap_interval(values)
    assert bootstrap_interval(values) == whole
    monkeypatch.setattr("dit_accel.eval.metrics.figures._AT_ONCE", 1000)
    assert bootstrap_interval(values) == pytest.approx(whole, abs=0.02)


def test_one_value_has_no_interval():
    assert mean_figure([2.0], "dB")["interval_95"] is None


def test_infinite_values_are_counted():
    found = mean_figure([30.0, math.inf, 40.0], "dB")
    assert (found["value"], found["n"], found["infinite"]) == (35.0, 3, 1)


def test_only_infinite_values_have_no_mean():
    found = mean_figure([math.inf, math.inf], "dB")
    assert found["value"] is None
    assert (found["n"], found["infinite"]) == (2, 2)
    assert "identical" in found["why"]
    json.dumps(found, allow_nan=False)


def test_no_values_have_no_mean():
    assert mean_figure([], "dB")["why"] == "there is nothing to average"


def test_nan_is_refused():
    with pytest.raises(ValueError, match="1 of 2 are NaN"):
        mean_figure([1.0, math.nan], "dB")
    with pytest.raises(ValueError, match="value=nan"):
        figure(math.nan, 1, "dB")


def test_share_has_wilsons_interval():
    from scipy.stats import binomtest

    found = share_figure(18, 20)
    theirs = binomtest(18, 20).proportion_ci(0.95, method="wilson")
    assert found["value"] == 0.9
    assert found["interval_95"] == pytest.approx([theirs.low, theirs.high], abs=1e-4)
