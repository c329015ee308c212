"""Measure time and memory of functions to compare, on a CPU or a GPU."""

import contextlib
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

Functions = dict[str, Callable[[], Any]]


def seconds(
    functions: Functions,
    repeats: int,
    device: str,
    *,
    wall: bool = False,
    prepare: Callable[[], Any] | None = None,
) -> dict[str, list[float]]:
    """Return the seconds that each function takes, `repeats` times, in turns.

    Each function is called once before, to warm up. On a GPU the time lies between two events of its queue and
    includes the host where the host is slower.

    Args:
        functions: functions without arguments, by name.
        repeats: number of timed calls of each function.
        device: "cpu" or a CUDA device.
        wall: on a CPU, read the wall clock. Default: the CPU time of this process, which other processes
            disturb less.
        prepare: on a GPU, called before each timed call and not timed. Work that it queues gives the host
            time to get ahead.
    """
    for function in functions.values():
        function()
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            found[name].append(_once(function, device, wall, prepare))
    return found


def _once(
    function: Callable[[], Any], device: str, wall: bool, prepare: Callable[[], Any] | None
) -> float:
    if device == "cpu":
        clock = time.perf_counter if wall else time.process_time
        start = clock()
        function()
        return clock() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if prepare is not None:
        prepare()
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def summary(values: list[float]) -> dict[str, float]:
    """Return the 20th, 50th and 80th percentile."""
    fifths = statistics.quantiles(values, n=5) if len(values) > 1 else [values[0]] * 4
    return {"p20": fifths[0], "p50": statistics.median(values), "p80": fifths[-1]}


def peak_gpu_bytes(function: Callable[[], Any]) -> int:
    """Return the peak of bytes that a call allocates beyond what was allocated before."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def gpu_clocks() -> dict[str, str] | None:
    """Return clocks, power and temperature as the driver reports them; None without a driver."""
    fields = "clocks.sm,clocks.mem,clocks_throttle_reasons.active,power.draw,temperature.gpu"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        out = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout
        return dict(zip(fields.split(","), (x.strip() for x in out.split(",")), strict=True))
    return None
