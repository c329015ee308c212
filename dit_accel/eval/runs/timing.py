"""`Stopwatch`: calls that are measured one at a time: seconds by phase, memory, density."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dit_accel.eval.runs.methods import Method
from dit_accel.eval.runs.peak_memory import Peak, peak_memory
from dit_accel.sampling.acceleration import accelerated
from dit_accel.sampling.batches import run_warm_up
from dit_accel.sampling.call import BatchResult, run_batch
from dit_accel.sampling.plan import Sample


@dataclass(frozen=True)
class Call:
    """Result and cost of one measured call."""

    made: BatchResult
    """One sample."""
    peak: Peak

    def record(self) -> dict[str, Any]:
        """Return the measurements, for JSON."""
        return {
            "seconds": self.made.seconds,
            "peak_bytes": self.peak.size,
            "peak_of": self.peak.of,
            "dense_calls": self.made.summary.dense_calls,
        }


def measured_call(pipe: Any, method: Method, sample: Sample) -> Call:
    """Make one call for one sample, with the acceleration on for it alone."""
    steps = method.num_inference_steps
    changed = {} if steps is None else {"num_inference_steps": steps}
    with (
        accelerated(pipe, **method.acceleration),
        peak_memory(pipe._execution_device) as peak,
    ):
        made = run_batch(pipe, [sample], **changed)
    return Call(made, peak)


class Stopwatch:
    """Measures methods in turns, so that a machine that slows down slows all of them."""

    def __init__(
        self,
        pipe: Any,
        samples: Sequence[Sample],
        *,
        calls: dict[str, list[dict[str, Any]]] | None = None,
        on_call: Callable[[Method, Call], None] = lambda method, call: None,
    ) -> None:
        """Args:
        samples: round i makes sample i, and again from the first one.
        calls: records of earlier measurements, by name of the method.
        on_call: called after each measured call.
        """
        self._pipe = pipe
        self._samples = samples
        self._on_call = on_call
        self.calls = {} if calls is None else calls
        """Records by name of the method, a round each."""
        self._warm: set[str] = set()

    def run(self, methods: Sequence[Method], rounds: int) -> None:
        """Measure until each method has been measured `rounds` times."""
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
                    sample = self._samples[i % len(self._samples)]
                    call = measured_call(self._pipe, method, sample)
                    records.append(call.record())
                    self._on_call(method, call)

    def seconds(self, method: Method, rounds: int | None = None) -> float:
        """Return the median of denoising, of the first `rounds`."""
        calls = self.calls[method.name][:rounds]
        return statistics.median(x["seconds"]["denoise"] for x in calls)

    def _warm_up(self, method: Method) -> None:
        """Make a call that is not measured."""
        with accelerated(self._pipe, **method.acceleration):
            run_warm_up(self._pipe, self._samples[:1])
