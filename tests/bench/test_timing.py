"""Timing of functions in turns."""

import time

import pytest

from dit_accel.bench import timing
from dit_accel.bench.timing import busy_seconds, seconds, summary, undisturbed


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


def clock_of_others(monkeypatch, disturbed):
    """Fake the clocks: each call takes one second, and other processes use a core during the calls in `disturbed`."""
    calls = []
    state = {"busy": 0.0, "now": 0.0}

    def work(name):
        state["now"] += 1
        state["busy"] += 2 if len(calls) in disturbed else 1
        calls.append(name)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: state["now"])
    monkeypatch.setattr(timing.time, "process_time", lambda: state["now"])
    monkeypatch.setattr(timing, "busy_seconds", lambda: state["busy"])
    return calls, {name: lambda name=name: work(name) for name in "ab"}


def test_calls_that_others_disturb_do_not_count(monkeypatch):
    # Calls 0 and 1 warm up; call 4 is the second one of "a".
    calls, functions = clock_of_others(monkeypatch, {4})
    found = undisturbed(functions, 2, 10)
    assert "".join(calls) == "ab" * 4
    assert [x.others for x in found["a"]] == [0, 0]
    assert [x.others for x in found["b"]] == [0, 0, 0]
    assert found["a"][0].wall == found["a"][0].cpu == 1


def test_on_a_busy_machine_disturbed_calls_count_after_some_rounds(monkeypatch):
    calls, functions = clock_of_others(monkeypatch, set(range(100)))
    found = undisturbed(functions, 2, 3)
    assert "".join(calls) == "ab" * 4
    assert [x.others for x in found["a"]] == [1, 1, 1]
    assert not any(x.is_quiet for x in found["a"])


def test_where_the_system_says_nothing_every_call_counts(monkeypatch):
    calls, functions = clock_of_others(monkeypatch, set())
    monkeypatch.setattr(timing, "busy_seconds", lambda: None)
    found = undisturbed(functions, 2, 9)
    assert "".join(calls) == "ab" * 3
    assert [x.others for x in found["a"]] == [None, None]


@pytest.mark.skipif(busy_seconds() is None, reason="no /proc/stat")
def test_busy_seconds_hold_those_of_this_process():
    start, cpu = busy_seconds(), time.process_time()
    while time.process_time() - cpu < 0.3:
        pass
    assert busy_seconds() - start > 0.25


def test_percentiles():
    found = summary([float(x) for x in range(1, 10)])
    assert found == {"p20": 2.0, "p50": 5.0, "p80": 8.0}
    assert summary([4.0]) == {"p20": 4.0, "p50": 4.0, "p80": 4.0}
