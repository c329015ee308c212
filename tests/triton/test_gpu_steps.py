"""Steps of the GPU check on small shapes, with the real kernels in Triton's interpreter."""

import contextlib
import sys
import time

import pytest
import torch

from dit_accel.bench.gpu import cases, profiles, speed, sweep
from dit_accel.bench.gpu.cases import MODES, Shape
from dit_accel.bench.gpu.dense import DenseTile
from dit_accel.bench.gpu.device import Device
from dit_accel.bench.timing import summary
from dit_accel.kernels.block_sparse.tiles import Tile

SMALL = Shape("small", 1, 88, 16, block_q=32, block_k=32)
WITH_TEXT = Shape("with text", 1, 64, 16, batch=2, text=20, block_q=32, block_k=32)


class Interpreter(Device):
    """CPU device on which Triton's interpreter runs the kernels."""

    place = "cpu"

    def _measure(self, functions, repeats):
        return {name: self._once(function) for name, function in functions.items()}

    def _once(self, function):
        start = time.process_time()
        function()
        return summary([1000 * (time.process_time() - start) + 1e-3])

    def wait(self):
        pass

    def graph(self, function):
        return function

    def peak_mib(self, function):
        function()
        return 1.0

    def host_us(self, function, calls=1):
        return super().host_us(function, calls)

    def profile(self, function):
        raise RuntimeError("profiling is forbidden")

    def forget(self):
        pass

    @contextlib.contextmanager
    def poisoned(self):
        yield


@pytest.fixture(autouse=True)
def triton_by_default(monkeypatch):
    for name, module in list(sys.modules.items()):
        if name.startswith("dit_accel.kernels") and hasattr(module, "runs_here"):
            monkeypatch.setattr(module, "runs_here", lambda x: x.dtype != torch.float64)
    monkeypatch.setattr(speed, "repeats", lambda shape: 1)
    monkeypatch.setattr(speed, "best_tile", lambda found, shape: DenseTile(32, 32, 1, 1))
    monkeypatch.setattr(profiles, "WAN", SMALL)
    monkeypatch.setattr(cases, "DTYPE", torch.float16)  # the interpreter knows no bf16


@pytest.mark.parametrize(
    ("shape", "mode"),
    [
        *((SMALL, mode) for mode in ("none", "complement", "shared_softmax", "marginal")),
        (WITH_TEXT, "marginal"),
    ],
)
def test_forward(shape, mode):
    result = speed.forward(shape, 0.25, mode).run(Interpreter(), {})
    assert result["kernel"] == "forward"
    assert {"flash", "kernel", "attention", "eager", "graph", "dense triton"} <= set(result["ms"])
    assert set(result["ms"]["refused"]) == {"cudnn"}
    assert 0.15 < result["density"] < 0.8
    work = [result["ratios"][x]["tflops"] * result["ms"][x]["p50"] for x in ("kernel", "eager")]
    # Text queries use dense attention, not this kernel.
    assert (work[0] < 0.999 * work[1]) == bool(shape.text)


@pytest.mark.parametrize("mode", MODES)
def test_backward(mode):
    result = speed.backward(SMALL, 0.25, mode).run(Interpreter(), {})
    assert {"backward", "launch rows", "launch columns", "flash"} <= set(result["ms"])
    assert result["launches_ms"] > 0
    assert "cudnn" in result["refused"]


@pytest.mark.parametrize(
    ("mode", "kernel"),
    [
        *((mode, "forward") for mode in ("none", "complement", "shared_softmax")),
        *(("none", x) for x in ("rows", "columns")),
        *(("complement", x) for x in ("rows", "linear_columns")),
    ],
)
def test_every_tile_gives_the_output_of_the_default(monkeypatch, mode, kernel):
    monkeypatch.setattr(sweep, "neighbours", lambda *x: [Tile(16, 16, 1, 1)])
    result = sweep.sweep(SMALL, mode, kernel).run(Interpreter(), {})
    assert "wrong" not in result
    assert "not_launchable" not in result
    assert {"16x16 w1 s1", "flash"} <= set(result["ms"])


def test_a_tile_with_another_output_is_told_and_not_timed(monkeypatch):
    right = sweep.retiled

    def short(launch, tile):
        found = right(launch, tile)
        return found.changed(
            (found.grid[0] // 2, *found.grid[1:])
        )  # half of the programs are missing

    monkeypatch.setattr(sweep, "retiled", short)
    monkeypatch.setattr(sweep, "neighbours", lambda *x: [Tile(16, 32, 1, 1)])
    result = sweep.sweep(SMALL, "none", "forward").run(Interpreter(), {})
    assert list(result["wrong"]) == ["16x32 w1 s1"]
    assert "16x32 w1 s1" not in result["ms"]


def test_a_tile_that_cannot_be_launched_is_told(monkeypatch):
    def refuse(launch, tile):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(sweep, "retiled", refuse)
    monkeypatch.setattr(sweep, "neighbours", lambda *x: [Tile(16, 32, 1, 1)])
    result = sweep.sweep(SMALL, "none", "forward").run(Interpreter(), {})
    assert "shared memory" in result["not_launchable"]["16x32 w1 s1"]


def test_profile_and_memory():
    result = profiles.profile("all").run(Interpreter(), {})
    assert result["triton_launches"] == len(result["ms"])
    assert "forbidden" in result["profiler_refused"]
    assert result["host_us"]["call"]["p50"] > 0
    assert profiles.memory("none").run(Interpreter(), {})["of_flash_forward"] == 1
