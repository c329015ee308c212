"""Calls that are measured one at a time: seconds by phase, memory, and what was spared."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_accel import control
from dit_accel.eval.runs.methods import Method
from dit_accel.eval.runs.peak_memory import Peak, peak_memory
from dit_accel.sampling.acceleration import accelerated
from dit_accel.sampling.batches import WARM_UP_STEPS
from dit_accel.sampling.pipeline_call import Sampling, run_once


@dataclass(frozen=True)
class Request:
    """What a measured call has to make."""

    prompt: str
    sampling: Sampling
    seed: int


@dataclass(frozen=True)
class Call:
    """What one call made and took."""

    frames: np.ndarray
    """`[T, H, W, 3]` in [0, 1]."""
    seconds: dict[str, float]
    """By phase."""
    summary: control.Summary
    peak: Peak

    def record(self) -> dict[str, Any]:
        """The measurements, for JSON."""
        return {
            "seconds": self.seconds,
            "peak_bytes": self.peak.size,
            "peak_of": self.peak.of,
            "dense_calls": self.summary.dense_calls,
        }


def measured_call(pipe: Any, method: Method, request: Request) -> Call:
    """One call with batch 1, the acceleration on for it alone."""
    sampling = request.sampling
    if method.num_inference_steps is not None:
        sampling = sampling.overridden(num_inference_steps=method.num_inference_steps)
    with (
        accelerated(pipe, **method.acceleration),
        peak_memory(pipe._execution_device) as peak,
    ):
        frames, seconds, summary = run_once(pipe, request.prompt, sampling, request.seed)
    return Call(frames, seconds, summary, peak)


class Stopwatch:
    """Measures methods in turns, so that a machine that slows down slows all of them."""

    def __init__(
        self,
        pipe: Any,
        requests: Sequence[Request],
        *,
        calls: dict[str, list[dict[str, Any]]] | None = None,
        on_call: Callable[[Method, Call], None] = lambda method, call: None,
    ) -> None:
        """`calls` are records of earlier measurements, by name; round i makes request i, and again from
        the first one."""
        self._pipe = pipe
        self._requests = requests
        self._on_call = on_call
        self.calls = {} if calls is None else calls
        """Records by name of the method, a round each."""
        self._warm: set[str] = set()

    def run(self, methods: Sequence[Method], rounds: int) -> None:
        """Until each method has been measured so often."""
        missing = [x for x in methods if len(self.calls.get(x.name, [])) < rounds]
        for method in missing:
            if method.name not in self._warm:
                self._warm_up(method)
                self._warm.add(method.name)
        for i in range(rounds if missing else 0):
            first = i % len(missing)  # none always runs after the same one
            for method in [*missing[first:], *missing[:first]]:
                records = self.calls.setdefault(method.name, [])
                if len(records) == i:
                    request = self._requests[i % len(self._requests)]
                    call = measured_call(self._pipe, method, request)
                    records.append(call.record())
                    self._on_call(method, call)

    def seconds(self, method: Method, rounds: int | None = None) -> float:
        """The median of denoising, of the first `rounds`."""
        calls = self.calls[method.name][:rounds]
        return statistics.median(x["seconds"]["denoise"] for x in calls)

    def _warm_up(self, method: Method) -> None:
        """A call that is not measured: what happens once only, such as compiling a kernel, must not count."""
        request = self._requests[0]
        sampling = request.sampling
        if (
            method.sla is None and method.ras is None
        ):  # else a late step may be the first of its kind
            sampling = sampling.overridden(num_inference_steps=WARM_UP_STEPS)
        with accelerated(self._pipe, **method.acceleration):
            run_once(self._pipe, request.prompt, sampling, request.seed)
