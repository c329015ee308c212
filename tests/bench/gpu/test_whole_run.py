"""A whole run of `kernels/gpu_check.py` with its processes, on a stand-in for a device."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ...installed import ROOT

SCRIPT = ROOT / "kernels" / "gpu_check.py"
# Python loads this module first, in every process.
DEVICE = """
import os, time, torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda *_: "made up"
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_: None

from dit_accel.bench.gpu import steps
from dit_accel.bench.gpu.journal import SubStep

def sub_steps(left):
    return [
        SubStep("compile", "first", lambda device, found: {"at": time.time()}),
        SubStep("a", "one", lambda device, found: {"at": time.time()}),
        SubStep("a", "slow", lambda device, found: time.sleep(float(os.environ.get("SLOW", 0))) or {}),
        SubStep("b", "abort", lambda device, found: os.abort()),
        SubStep("b", "wrong", lambda device, found: {"passed": True, "errors": {}}),
    ]

steps.sub_steps = sub_steps
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(DEVICE)

    def run(*arguments, **environment):
        command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out"), *arguments]
        env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", **environment}
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
        )

    return run


def data(tmp_path):
    return json.loads((tmp_path / "out" / "gpu_check.json").read_text())


def test_a_run_is_stopped_and_goes_on_and_survives_an_abort(start, tmp_path):
    process = start(SLOW="60")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        time.sleep(0.1)
        try:
            if data(tmp_path)["running"]["id"] == "a/slow":
                break
        except (OSError, TypeError):
            pass
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 143, text
    assert "--resume" in text
    before = data(tmp_path)
    assert {n: x["status"] for n, x in before["steps"].items()} == dict.fromkeys(
        ("compile/first", "a/one"), "done"
    )
    assert (tmp_path / "out" / "gpu_check.md").exists()

    process = start("--resume")
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 1, text  # one sub-step crashed
    after = data(tmp_path)
    statuses = {n: x["status"] for n, x in after["steps"].items()}
    assert statuses == {
        "a/one": "done",
        "compile/first": "done",
        "a/slow": "done",
        "b/abort": "crashed",
        "b/wrong": "done",
    }
    assert after["steps"]["a/one"] == before["steps"]["a/one"]
    # The cache of kernels may be gone when a run is resumed, but not when a process was replaced.
    assert after["steps"]["compile/first"] != before["steps"]["compile/first"]
    assert text.count("compile/first") == 1
    assert {x["verdict"] for x in after["bounds"]} == {"not measured"}
