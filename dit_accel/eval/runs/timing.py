"""Measured calls: seconds by phase, peak memory, and dense sampling with fewer steps in the same time."""

import contextlib
import ctypes
import gc
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_accel.eval.runs.methods import DENSE, Method, dense_with
from dit_accel.files import write_json
from dit_accel.sampling.acceleration import accelerated
from dit_accel.sampling.batches import progress_bar, quiet, run_warm_up
from dit_accel.sampling.call import BatchResult, run_batch
from dit_accel.sampling.manifest import differences
from dit_accel.sampling.plan import Sample

ATTEMPTS = 3
"""Searches for a nearer number of steps after the first guess. On a machine under load the search might never end."""
_PROC = Path("/proc/self")


@contextlib.contextmanager
def peak_memory(device: Any) -> Iterator[dict[str, Any]]:
    """Measure the peak memory of a block. Only Linux can reset the peak of a process; other systems measure nothing.

    Yields:
        A dict that is filled in when the block ends. "peak_bytes" includes weights. "peak_of" is "gpu" for memory that
        torch allocated there, or "process" for resident memory, Python and libraries included. None: not measured.
    """
    peak: dict[str, Any] = {"peak_bytes": None, "peak_of": None}
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak |= {"peak_bytes": torch.cuda.max_memory_allocated(device), "peak_of": "gpu"}
        return
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # memory that malloc keeps would count
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        (_PROC / "clear_refs").write_text("5")  # resets the high-water mark, see proc(5)
        peak["peak_of"] = "process" if device.type == "cpu" else None
    yield peak
    if peak["peak_of"] is not None:
        [kibi] = re.findall(r"VmHWM:\s*(\d+)", (_PROC / "status").read_text())
        peak["peak_bytes"] = int(kibi) * 1024


@dataclass
class MeasuredCalls:
    """Calls of one sample, measured one at a time. Methods take turns, so that a machine that slows down slows all.

    Args:
        pipe: a loaded pipeline without acceleration.
        samples: samples of one size. Round i makes sample i, and starts again from the first one.
        steps: number of steps of dense sampling.
        calls: records by name of the method, one for each round. Records of earlier calls are not measured again.
        on_call: called after each measured call.
    """

    pipe: Any
    samples: Sequence[Sample]
    steps: int
    calls: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    on_call: Callable[[Method, BatchResult], None] = lambda method, made: None
    _warm: set[str] = field(default_factory=set)
    _bar: Any = None

    def measure(
        self, methods: Sequence[Method], repeats: int, *, progress: bool = False
    ) -> list[Method]:
        """Measure each method `repeats` times, and return the dense ones with fewer steps, the most steps first."""
        compared = [x for x in methods if x.runs]
        given = [x.num_inference_steps for x in methods if x.fewer and x.num_inference_steps]
        found: dict[str, int] = {}
        with progress_bar(desc="timing", unit="call", disable=not progress) as bar:
            self._bar = bar
            if any(x.at_equal_time for x in methods) and len(compared) > 1:
                found = self._equal_time(compared, given, repeats)
            else:
                self.run([*compared, *map(dense_with, given)], repeats)
        fewer = []
        for steps in sorted({*found.values(), *given}, reverse=True):
            names = [name for name, n in found.items() if n == steps]
            fewer.append(dense_with(steps, **({"equal_time_to": names} if names else {})))
        return fewer

    def run(self, methods: Sequence[Method], rounds: int) -> None:
        """Measure until each method has been measured `rounds` times."""
        missing = [x for x in methods if len(self.calls.get(x.name, [])) < rounds]
        with quiet(self.pipe):
            for method in missing:
                if method.name not in self._warm:
                    with accelerated(self.pipe, **method.acceleration):
                        run_warm_up(self.pipe, self.samples[:1])
                    self._warm.add(method.name)
            for i in range(rounds if missing else 0):
                first = i % len(missing)  # no method always runs after the same one
                for method in [*missing[first:], *missing[:first]]:
                    if len(self.calls.setdefault(method.name, [])) == i:
                        self._call(method, self.samples[i % len(self.samples)])

    def _call(self, method: Method, sample: Sample) -> None:
        """Make one sample, and keep the record of the call."""
        steps, on = method.num_inference_steps, accelerated(self.pipe, **method.acceleration)
        changed = {} if steps is None else {"num_inference_steps": steps}
        with on, peak_memory(self.pipe._execution_device) as peak:
            made = run_batch(self.pipe, [sample], **changed)
        record = {"seconds": made.seconds, **peak, "dense_calls": made.summary.dense_calls}
        self.calls[method.name].append(record)
        self.on_call(method, made)
        if self._bar is not None:
            self._bar.update()

    def seconds(self, method: Method, rounds: int | None = None) -> float:
        """Return the median seconds of denoising of the first `rounds` calls, by default of all."""
        calls = self.calls[method.name][:rounds]
        return statistics.median(x["seconds"]["denoise"] for x in calls)

    def _equal_time(
        self, compared: Sequence[Method], given: Sequence[int], repeats: int
    ) -> dict[str, int]:
        """Measure all methods, and return the number of dense steps in the time of each that is faster than dense.

        After one round the numbers are roughly known, and these dense runs take turns with the other methods.
        """
        numbers, rounds = dict.fromkeys(given), 1
        for _ in range(ATTEMPTS + 2):
            self.run([*compared, *map(dense_with, numbers)], rounds)
            # Seconds of these rounds only: a run that goes on must search as it did at first.
            measured = {n: self.seconds(dense_with(n), rounds) for n in numbers}
            times = {x.name: self.seconds(x, rounds) for x in compared}
            dense = {self.steps: times[DENSE.name]}
            targets = {name: x for name, x in times.items() if x < times[DENSE.name]}
            found = [nearest_steps(measured | dense, x, self.steps - 1) for x in targets.values()]
            if rounds == repeats and set(found) <= set(measured):
                break
            numbers, rounds = numbers | dict.fromkeys(found), repeats
        return {
            name: min(measured, key=lambda n: (abs(measured[n] - x), n))
            for name, x in targets.items()
        }


def seconds_of(measured: Mapping[int, float], steps: int) -> float:
    """Return the seconds of `steps` dense steps, on straight lines through the measurements; one has a line through 0."""
    points = dict(sorted(measured.items())) if len(measured) > 1 else {0: 0.0, **measured}
    (x0, y0), (x1, y1), *_ = points.items()
    points = {0: y0 - x0 * (y1 - y0) / (x1 - x0)} | points
    return float(np.interp(steps, list(points), list(points.values())))


def nearest_steps(measured: Mapping[int, float], seconds: float, most: int) -> int:
    """Return the number of steps in [1, most] whose seconds are nearest; the smaller one of two equally near."""
    return min(range(1, most + 1), key=lambda n: (abs(seconds_of(measured, n) - seconds), n))


class Log:
    """File of results by method, so that a killed run goes on. Results of other settings are dropped with a note."""

    def __init__(self, path: Path, about: Mapping[str, Any], kind: str) -> None:
        """`about` is everything that the results depend on; `kind` is the key of the results in the file."""
        self._path, self._kind = path, kind
        self._about = json.loads(json.dumps({"format_version": 1, **about}))
        self.results: dict[str, Any] = {}
        if not path.is_file():
            return
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            different = differences(saved["about"], self._about)
            if not different:
                self.results = dict(saved[kind].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            different = [f"the file is damaged ({error!r})"]
        if different:
            sys.stderr.write(f"note: {path.name} is not used: {'; '.join(different[:3])}\n")

    def write(self) -> None:
        """Write the file atomically."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, {"about": self._about, self._kind: self.results})
