"""A run of the GPU check: budget, failures, stops, and resumption."""

import json
import os
import signal
import sys
import time

import pytest

from dit_accel.bench.gpu.device import Device, DeviceLostError
from dit_accel.bench.gpu.journal import Journal, ResumeError, SubStep
from dit_accel.bench.gpu.runner import Stopped, estimate, run_all, stops_on_signal
from dit_accel.bench.gpu.supervisor import DEVICE_LOST, STOPPED, supervise

FACTS = {"device": "some GPU", "capability": "9.0", "source": "abc"}


class Idle(Device):
    """Device on which no work runs."""

    lost = False
    dry = True

    def wait(self):
        if self.lost:
            raise DeviceLostError("illegal memory access")

    def forget(self):
        pass


@pytest.fixture
def path(tmp_path):
    return tmp_path / "gpu_check.json"


def run(path, sub_steps, *, device=None, left=1000.0, resume=False):
    journal = Journal(path, FACTS, resume=resume)
    lines = []
    run_all(sub_steps, device or Idle(), journal, left=lambda: left, say=lines.append)
    return lines


def statuses(path):
    return {n: x["status"] for n, x in json.loads(path.read_text())["steps"].items()}


def good(name, calls=None):
    def measure(device, found):
        if calls is not None:
            calls.append(name)
        return {"value": 1.0, "found": sorted(found)}

    return SubStep("step", name, measure)


def broken(name, error):
    def measure(device, found):
        raise error

    return SubStep("step", name, measure)


def test_a_failure_costs_one_sub_step_and_says_why(path):
    lines = run(path, [good("a"), broken("b", ZeroDivisionError("by\nzero")), good("c")])
    assert statuses(path) == {"step/a": "done", "step/b": "failed", "step/c": "done"}
    steps = json.loads(path.read_text())["steps"]
    assert steps["step/b"]["error"] == "ZeroDivisionError: by"
    assert steps["step/b"]["where"]
    assert steps["step/c"]["result"]["found"] == ["step/a"]
    assert [x.startswith(f"[{i}/3, 1000 s left] step/") for i, x in enumerate(lines, 1)] == [
        True
    ] * 3


def test_what_does_not_fit_into_the_budget_is_skipped_and_run_on_resume(path):
    long = SubStep("step", "long", lambda device, found: {}, seconds=100.0)
    run(path, [long, good("short")], left=50.0)
    assert statuses(path) == {"step/long": "skipped", "step/short": "done"}
    run(path, [long, good("short")], left=200.0, resume=True)
    assert statuses(path) == {"step/long": "done", "step/short": "done"}


def test_time_of_products_follows_the_measured_peak():
    sub_step = SubStep("step", "products", lambda device, found: {}, seconds=1.0, flops=3e15)
    assert estimate(sub_step, {}) == 1
    assert estimate(sub_step, {"ceilings/matmul": {"tflops": 1000.0}}) == pytest.approx(11)


def test_the_file_is_written_after_every_sub_step(path):
    def look(device, found):
        data = json.loads(path.read_text())
        assert data["running"]["id"] == "step/look"
        return dict(seen=list(data["steps"]))

    run(path, [good("a"), SubStep("step", "look", look)])
    assert json.loads(path.read_text())["steps"]["step/look"]["result"] == {"seen": ["step/a"]}


def test_a_stop_loses_the_running_sub_step_alone(path):
    calls = []

    def killed(device, found):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    with pytest.raises(Stopped), stops_on_signal():
        run(path, [good("a", calls), SubStep("step", "b", killed), good("c", calls)])
    assert statuses(path) == {"step/a": "done"}
    assert json.loads(path.read_text())["running"] is None
    run(path, [good("a", calls), good("b", calls), good("c", calls)], resume=True)
    assert calls == ["a", "b", "c"]


def test_a_lost_device_ends_the_process_with_the_sub_step_marked(path):
    device = Idle()

    def lose(device, found):
        device.lost = True
        raise RuntimeError("CUDA error")

    with pytest.raises(DeviceLostError):
        run(path, [SubStep("step", "a", lose), good("b")], device=device)
    assert statuses(path) == {"step/a": "crashed"}
    run(path, [good("a"), good("b")], resume=True)
    assert statuses(path) == {"step/a": "crashed", "step/b": "done"}


@pytest.mark.parametrize("name", ["device", "capability", "source"])
def test_resume_refuses_another_device_or_source(path, name):
    Journal(path, FACTS)
    with pytest.raises(ResumeError, match=rf"--resume: .*{name}="):
        Journal(path, {**FACTS, name: "other"}, resume=True)


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "[]",
        '{"steps": {}, "format_version": 0}',
        json.dumps({**FACTS, "format_version": 1, "steps": {"step/a": {}}}),
        json.dumps({**FACTS, "format_version": 1, "steps": {"step/a": {"status": "done"}}}),
    ],
)
def test_resume_refuses_what_is_no_run(path, content):
    if content is not None:
        path.write_text(content)
    with pytest.raises(ResumeError, match="--resume"):
        Journal(path, FACTS, resume=True)


CHILD = """
import json, os, sys, time
path, behaviour, restarted = sys.argv[1:]
data = json.load(open(path)) if os.path.exists(path) else {"steps": {}, "runs": 0}
data["runs"] += 1
data["running"] = {"id": "step/a", "since": time.time(), "limit_s": 1.0}
if restarted == "True" or behaviour == "good":
    data["running"] = None
    json.dump(data, open(path, "w"))
    sys.exit(int(behaviour == "wrong"))
if behaviour == "early":
    data["running"] = None
json.dump(data, open(path, "w"))
if behaviour == "hangs":
    time.sleep(60)
if behaviour == "lost":
    sys.exit(75)
os.abort()
"""


def supervised(path, behaviour):
    def command(restarted):
        return [sys.executable, "-c", CHILD, str(path), behaviour, str(restarted)]

    status = supervise(command, path, say=lambda line: None)
    return status, json.loads(path.read_text())


@pytest.mark.parametrize("behaviour", ["aborts", "hangs", "lost"])
def test_a_process_that_breaks_costs_one_sub_step(path, behaviour):
    assert DEVICE_LOST == 75
    status, data = supervised(path, behaviour)
    assert status == 0
    assert data["runs"] == 2
    assert data["steps"]["step/a"]["status"] == "crashed"


def test_a_process_that_dies_before_any_sub_step_is_not_started_again(path):
    status, data = supervised(path, "early")
    assert (status, data["runs"]) == (1, 1)


def test_a_process_that_ends_by_itself_is_not_started_again(path):
    status, data = supervised(path, "good")
    assert (status, data["runs"]) == (0, 1)


def test_a_signal_reaches_the_process(path):
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    start = time.monotonic()
    status = supervise(lambda restarted: [sys.executable, "-c", code], path, say=print)
    assert status == STOPPED
    assert time.monotonic() - start < 30


def test_numbers_that_are_not_finite_are_valid_json(path):
    odd = SubStep(
        "step", "odd", lambda device, found: {"x": [float("nan"), -float("inf")], 3: True}
    )
    run(path, [odd])

    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    data = json.loads(path.read_text(), parse_constant=refuse)
    assert data["steps"]["step/odd"]["result"] == {"x": ["nan", "-inf"], "3": True}
