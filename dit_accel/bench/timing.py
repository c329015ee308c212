"""Time and memory of functions, on a CPU or a GPU."""

import contextlib
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

Functions = dict[str, Callable[[], Any]]
QUIET = 0.1
"""Number of CPU cores that other processes may use during an undisturbed call."""


class Timed(NamedTuple):
    """Time of one call on a CPU, in seconds."""

    wall: float
    cpu: float
    """CPU time of this process."""
    others: float | None
    """Average number of CPU cores that other processes used during the call. None: unknown."""

    @property
    def is_quiet(self) -> bool:
        """True if other processes used at most `QUIET` cores; False if unknown."""
        return self.others is not None and self.others < QUIET


def seconds(
    functions: Functions,
    repeats: int,
    device: str,
    *,
    wall: bool = False,
    prepare: Callable[[], Any] | None = None,
) -> dict[str, list[float]]:
    """Return the seconds of `repeats` calls of each function. Functions take turns.

    Each function is called once before, to warm up. On a GPU the time is that between two events of its queue, which
    includes host time if the host is slower.

    Args:
        functions: functions without arguments, by name.
        repeats: number of timed calls of each function.
        device: "cpu" or a CUDA device.
        wall: on a CPU, measure wall-clock time. Default: CPU time of this process, which other processes disturb less.
        prepare: on a GPU, function that is called before each timed call and not timed. Work that it queues gives the
            host time to get ahead of the device.
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


def undisturbed(functions: Functions, repeats: int, most: int) -> dict[str, list[Timed]]:
    """Return the times of calls of each function on a CPU that other processes did not disturb.

    After one warm-up call of each function, the functions take turns until each has `repeats` undisturbed calls. A
    function with fewer after `most` rounds returns all of its calls.

    Args:
        functions: functions without arguments, by name.
        repeats: number of undisturbed calls of each function.
        most: largest number of rounds.
    """
    for function in functions.values():
        function()
    found: dict[str, list[Timed]] = {name: [] for name in functions}
    for done in range(1, most + 1):
        for name, function in functions.items():
            found[name].append(_timed(function))
        quiet = {name: [x for x in times if x.is_quiet] for name, times in found.items()}
        known = all(x.others is not None for times in found.values() for x in times)
        if done >= repeats and (not known or min(map(len, quiet.values())) >= repeats):
            break
    return {name: x if len(x) >= repeats else found[name] for name, x in quiet.items()}


def _timed(function: Callable[[], Any]) -> Timed:
    wall, cpu, busy = time.perf_counter(), time.process_time(), busy_seconds()
    function()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    now = busy_seconds()
    others = None if now is None or busy is None else max(0.0, now - busy - cpu) / wall
    return Timed(wall, cpu, others)


def busy_seconds() -> float | None:
    """Return the CPU seconds that all processes have used since the machine started, or None if not on Linux.

    Time that a hypervisor gives to other machines counts as well.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        numbers = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
        user, nice, system, _, _, irq, soft_irq, steal = map(int, numbers[:8])
        ticks = user + nice + system + irq + soft_irq + steal
        return ticks / os.sysconf("SC_CLK_TCK")
    return None


def summary(values: list[float]) -> dict[str, float]:
    """Return the 20th, 50th and 80th percentile."""
    fifths = statistics.quantiles(values, n=5) if len(values) > 1 else [values[0]] * 4
    return {"p20": fifths[0], "p50": statistics.median(values), "p80": fifths[-1]}


def peak_gpu_bytes(function: Callable[[], Any]) -> int:
    """Return the peak number of bytes that a call allocates in addition to those allocated before."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def gpu_clocks() -> dict[str, str] | None:
    """Return the clocks, power and temperature that the driver reports, or None without a driver."""
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
