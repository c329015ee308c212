"""Timing of functions that a benchmark compares."""

import pytest

from dit_accel.bench.timing import seconds, summary


@pytest.mark.parametrize("wall", [False, True])
def test_functions_take_turns_after_one_call_each(wall):
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = seconds(functions, 3, "cpu", wall=wall)
    assert calls == ["a", "b"] + ["a", "b"] * 3
    assert {name: len(x) for name, x in found.items()} == {"a": 3, "b": 3}
    assert all(x >= 0 for values in found.values() for x in values)


def test_work_takes_more_time_than_none():
    found = seconds({"busy": lambda: sum(range(300_000)), "idle": lambda: None}, 5, "cpu")
    assert summary(found["busy"])["p50"] > summary(found["idle"])["p50"]


def test_percentiles():
    found = summary([float(x) for x in range(1, 10)])
    assert found == {"p20": 2.0, "p50": 5.0, "p80": 8.0}
    assert summary([4.0]) == {"p20": 4.0, "p50": 4.0, "p80": 4.0}
