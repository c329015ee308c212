"""Measured calls: turns, warm-up, records that are kept, equal time, memory."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_accel import control
from dit_accel.config import RASConfig, SLAConfig
from dit_accel.eval.runs import timing as module
from dit_accel.eval.runs.methods import AT_EQUAL_TIME, DENSE, Method, dense_with
from dit_accel.eval.runs.rows import build_row
from dit_accel.eval.runs.timing import (
    Log,
    MeasuredCalls,
    nearest_steps,
    peak_memory,
    seconds_of,
)
from dit_accel.runtime.install import installation_of
from dit_accel.sampling.batches import WARM_UP_STEPS
from dit_accel.sampling.call import BatchResult, phase_timer
from dit_accel.sampling.plan import plan_samples
from dit_accel.sampling.prompts import number_prompts
from dit_accel.sampling.settings import Sampling

from ..random_pipelines import make

SAMPLES = plan_samples(
    number_prompts(["a", "b"]), Sampling(num_inference_steps=10), seed=0, count=1, layout="ids"
)
RAS = Method(name="RAS", kind="ras", ras=RASConfig())
CACHE = Method(name="Cache", kind="cache")


@pytest.fixture(scope="module")
def pipe():
    return make("sd3")


@pytest.fixture
def clock(monkeypatch):
    """Calls that take what `clock.seconds` says, a warm-up a thousand; (prompt, steps, seed, on) of each."""

    class Clock:
        calls: list = []  # noqa: RUF012

        def seconds(self, steps, on):
            return 0.5 * steps if on else 1.0 * steps

    clock = Clock()
    clock.calls = []
    names = []

    def run_batch(pipe, samples, **overrides):
        [sample] = samples
        on = installation_of(pipe) is not None
        steps = sample.sampling.overridden(**overrides).num_inference_steps
        took = clock.seconds(steps, on)
        if (on or steps == WARM_UP_STEPS) and on not in names:
            names.append(on)
            took = 1000.0
        clock.calls.append((sample.record.prompt, steps, sample.seed, on))
        parts = {"text": 0.25, "denoise": took, "decode": 0.25, "total": took + 0.5}
        return BatchResult((sample,), np.zeros((1, 1, 8, 8, 3)), parts, control.summary(pipe))

    monkeypatch.setattr(module, "run_batch", run_batch)
    monkeypatch.setattr("dit_accel.sampling.batches.run_batch", run_batch)
    # Collecting garbage takes long in a process full of tests.
    monkeypatch.setattr("dit_accel.eval.runs.timing.gc.collect", lambda: 0)
    return clock


def calls_of(pipe, steps=10, **options):
    return MeasuredCalls(pipe, SAMPLES, steps, **options)


def denoise(calls, method):
    return [x["seconds"]["denoise"] for x in calls.calls[method.name]]


def test_methods_take_turns_and_warm_up_does_not_count(pipe, clock):
    seen = []
    calls = calls_of(pipe, on_call=lambda method, made: seen.append(method.name))
    calls.run([DENSE, RAS, CACHE], 3)
    assert clock.calls[:3] == [("a", 2, 0, False), ("a", 10, 0, True), ("a", 2, 0, False)]
    # Each round begins with the next method, and has the next prompt.
    assert seen == ["Dense", "RAS", "Cache", "RAS", "Cache", "Dense", "Cache", "Dense", "RAS"]
    assert [x[0] for x in clock.calls[3:]] == ["a"] * 3 + ["b"] * 3 + ["a"] * 3
    assert denoise(calls, DENSE) == [10.0] * 3
    assert denoise(calls, RAS) == [5.0] * 3
    assert calls.seconds(RAS) == 5.0
    assert calls.calls["RAS"][0]["seconds"]["total"] == 5.5
    assert installation_of(pipe) is None


def test_what_is_measured_already_is_not_measured_again(pipe, clock):
    calls = calls_of(pipe)
    calls.run([DENSE, RAS], 2)
    before = len(clock.calls)
    calls.run([DENSE, RAS], 2)
    assert len(clock.calls) == before
    again = calls_of(pipe, calls=calls.calls)
    again.calls["RAS"].pop()
    again.run([DENSE, RAS], 2)
    # Its warm-up, and the one call that is missing, with the prompt of that round.
    assert [x[:2] for x in clock.calls[before:]] == [("a", 10), ("b", 10)]


def test_the_median_counts(pipe, clock):
    took = iter([9.0, 1.0, 5.0])
    clock.seconds = lambda steps, on: next(took) if steps == 10 else 0.0
    calls = calls_of(pipe)
    calls.run([DENSE], 3)
    assert calls.seconds(DENSE) == 5.0


def test_fewer_steps_take_the_time_of_the_accelerated_run(pipe, clock):
    calls = calls_of(pipe)
    assert calls.measure([DENSE, AT_EQUAL_TIME, RAS], 3) == [dense_with(5, equal_time_to=["RAS"])]
    assert {name: len(x) for name, x in calls.calls.items()} == {
        "Dense": 3,
        "RAS": 3,
        "Dense, 5 steps": 3,
    }
    order = [x[1:] for x in clock.calls if x[1] != WARM_UP_STEPS]
    order.remove((10, 0, True))  # its warm-up, which is a whole call
    # After the first round the fewer steps are known, and take turns with the others.
    assert [x[0] for x in order[:3]] == [10, 10, 5]
    assert [x[0] for x in order[3:6]].count(5) == 1


def test_a_wrong_first_guess_is_mended(pipe, clock):
    """A part of the time is the same for any number of steps."""
    clock.seconds = lambda steps, on: 5.2 if on else 3.0 + 0.7 * steps
    calls = calls_of(pipe)
    assert [x.name for x in calls.measure([DENSE, AT_EQUAL_TIME, RAS], 1)] == ["Dense, 3 steps"]
    assert "Dense, 5 steps" in calls.calls  # the guess


def test_fewer_steps_never_take_the_time_of_methods_slower_than_dense_sampling(pipe, clock):
    clock.seconds = lambda steps, on: 3.0 * steps if on else 1.0 * steps
    calls = calls_of(pipe)
    assert calls.measure([DENSE, AT_EQUAL_TIME, RAS], 1) == []
    assert set(calls.calls) == {"Dense", "RAS"}
    assert calls.measure([DENSE, AT_EQUAL_TIME, dense_with(4), RAS], 1) == [dense_with(4)]


@pytest.mark.parametrize("seed", range(5))
def test_what_was_measured_is_not_measured_again_on_a_noisy_machine(pipe, clock, seed):
    rng = np.random.default_rng(seed)
    clock.seconds = lambda steps, on: steps * (0.5 if on else 1.0) * rng.normal(1, 0.05)
    calls, methods = calls_of(pipe, 30), [DENSE, AT_EQUAL_TIME, RAS]
    found = calls.measure(methods, 3)
    before = len(clock.calls)
    assert calls_of(pipe, 30, calls=calls.calls).measure(methods, 3) == found
    assert len(clock.calls) == before


@given(
    st.integers(2, 60),
    st.floats(0.01, 2),
    st.floats(0, 5),
    st.lists(st.floats(0.1, 100), min_size=1, max_size=4),
)
def test_the_nearest_number_of_steps_is_found(most, slope, fixed, targets):
    def took(n):
        return fixed + slope * n

    asked = set()

    class Line(MeasuredCalls):
        def run(self, methods, rounds):
            asked.update(x.num_inference_steps for x in methods if x.kind == "fewer_steps")

        def seconds(self, method, rounds=None):
            if method.kind == "cache":
                return targets[int(method.name)]
            return took(method.num_inference_steps or most + 1)

    caches = [Method(name=str(i), kind="cache") for i in range(len(targets))]
    found = Line(None, [], most + 1)._equal_time([DENSE, *caches], [], 1)
    assert set(found) == {str(i) for i, x in enumerate(targets) if x < took(most + 1)}
    for name, n in found.items():
        assert 1 <= n <= most
        assert n in asked
        # The time is a line, so that the second attempt is right.
        best = min(abs(took(x) - targets[int(name)]) for x in range(1, most + 1))
        assert abs(took(n) - targets[int(name)]) == pytest.approx(best, abs=1e-6)
    assert len(asked) <= 3 * len(targets)


def test_seconds_between_measurements_lie_on_the_line():
    measured = {4: 2.0, 10: 8.0}
    assert [seconds_of(measured, n) for n in (3, 4, 7, 10)] == [1.0, 2.0, 5.0, 8.0]
    assert seconds_of({10: 5.0}, 4) == 2.0
    assert nearest_steps({10: 10.0}, 4.5, 9) == 4  # equally near: the fewer
    assert nearest_steps({10: 10.0}, 99.0, 9) == 9
    assert nearest_steps({10: 10.0}, 0.0, 9) == 1


def test_a_log_keeps_calls_of_the_same_settings_only(tmp_path, capsys):
    about = {"machine": {"cores": 2}, "methods": [["Dense", {"a": (1, 2)}]]}
    path = tmp_path / "timings.json"
    log = Log(path, about, "calls")
    assert log.results == {}
    log.results["Dense"] = [{"seconds": {"total": 1.5}}]
    log.write()
    assert Log(path, about, "calls").results == log.results
    assert capsys.readouterr().err == ""
    assert Log(path, about | {"machine": {"cores": 8}}, "calls").results == {}
    assert "timings.json is not used: machine.cores was 2 and is 8" in capsys.readouterr().err
    path.write_text(json.dumps({"about": 3})[:-2])
    assert Log(path, about, "calls").results == {}
    assert "timings.json is not used: the file is damaged" in capsys.readouterr().err


def test_the_peak_of_one_block_is_not_that_of_another():
    with peak_memory("cpu") as large:
        np.ones(150 << 17)  # 150 MiB
    with peak_memory("cpu") as small:
        np.ones(1 << 17)
    if large["peak_bytes"] is None:
        pytest.skip("this system does not forget a process's peak")
    assert large["peak_of"] == "process"
    assert 120 << 20 < large["peak_bytes"] - small["peak_bytes"] < 180 << 20


def test_where_the_system_does_not_tell_nothing_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr("dit_accel.eval.runs.timing._PROC", tmp_path / "none")
    with peak_memory("cpu") as peak:
        pass
    assert peak == {"peak_bytes": None, "peak_of": None}


def record(took, peak=100, of="process", dense=()):
    seconds = {"text": 0.0, "denoise": took, "decode": 0.0, "total": took}
    return {"seconds": seconds, "peak_bytes": peak, "peak_of": of, "dense_calls": dict(dense)}


def test_rows_hold_medians_ratios_and_the_highest_peak(pipe):
    calls = {
        "Dense": [record(4.0), record(8.0), record(5.0)],
        "RAS": [record(2.0, 300), record(2.5, 700), record(3.0, 200, dense={"dense step": 3})],
        "Dense, 5 steps": [record(1.0, None, None)],
    }
    measured = calls_of(pipe, calls=calls)
    dense = build_row(DENSE, measured)
    assert (dense["density"], dense["cost"]) == (1.0, 10.0)
    assert dense["speedup"] == {"denoise": 1.0, "total": 1.0}
    method = Method(name="RAS", kind="ras", settings={"ras": {}})
    row = build_row(method, measured, cost=7.5)
    assert row["seconds"]["denoise"] == {"median": 2.5, "iqr": [2.25, 2.75], "n": 3}
    assert row["speedup"]["denoise"] == 2.0
    assert (row["peak_memory_bytes"], row["peak_memory_of"]) == (700, "process")
    assert row["settings"] == {"ras": {}, "dense_calls": {"dense step": 3}}
    assert (row["density"], row["cost"]) == (None, 7.5)
    unknown = build_row(dense_with(5), measured)
    assert (unknown["peak_memory_bytes"], unknown["peak_memory_of"]) == (None, None)
    assert (unknown["density"], unknown["cost"]) == (1.0, 5.0)
    row = build_row(Method(name="SeaCache", kind="cache", why="not here"), measured)
    assert (row["available"], row["why"], row["seconds"]) == (False, "not here", {})


def test_seconds_wait_for_the_device_that_works(pipe, monkeypatch):
    """Not for the current one: under torchrun, or with cuda:1, that is another."""
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(device))
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("cuda", 3))
    with phase_timer(pipe) as seconds:
        pass
    assert waited == [torch.device("cuda", 3)] * 2
    assert seconds["total"] >= 0


def test_what_is_accelerated_is_warmed_up_whole(pipe, clock):
    """Its first step of a kind can be a late one."""
    sla = Method(name="SLA", kind="sla", sla=SLAConfig(dense_steps=3, crossover="never"))
    calls_of(pipe).run([DENSE, sla], 1)
    assert [x[1] for x in clock.calls[:2]] == [2, 10]
