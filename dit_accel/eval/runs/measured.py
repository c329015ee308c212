"""`MeasuredCalls`: timed calls of every method of an evaluation, and table rows made of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dit_accel.eval.results.types import MetricValue, Row
from dit_accel.eval.runs.fewer_steps import measure_all
from dit_accel.eval.runs.lineup import Lineup
from dit_accel.eval.runs.methods import DENSE, Method, dense_with
from dit_accel.eval.runs.rows import build_row, timing, unavailable_row
from dit_accel.eval.runs.timing import Call, Stopwatch
from dit_accel.sampling.batches import progress_bar, quiet
from dit_accel.sampling.plan import Sample


@dataclass
class MeasuredCalls:
    """Measured calls by method; used by `run_evaluation` and by `compare`, which evaluates one prompt."""

    pipe: Any
    samples: Sequence[Sample]
    lineup: Lineup
    calls: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Records by name of the method, those of an earlier run included."""
    fewer: list[Method] = field(default_factory=list)
    """Dense methods with fewer steps that belong into the table; known after `measure`."""

    def measure(
        self,
        repeats: int,
        *,
        on_call: Callable[[Method, Call], None] = lambda method, call: None,
        progress: bool = False,
    ) -> None:
        """Measure every method, the methods taking turns.

        Args:
            repeats: calls of each method, one sample after the other.
            on_call: called after each measured call.
            progress: show a bar on stderr.
        """
        lineup = self.lineup
        with (
            progress_bar(desc="timing", unit="call", disable=not progress) as bar,
            quiet(self.pipe),
        ):

            def finished(method: Method, call: Call) -> None:
                on_call(method, call)
                bar.update()

            # Samples of the first one's size, so that seconds can be compared.
            like = [x for x in self.samples if x.call == self.samples[0].call]
            watch = Stopwatch(self.pipe, like[:repeats], calls=self.calls, on_call=finished)
            self.fewer, found = measure_all(
                watch, lineup.runnable, lineup.fewer, repeats, steps=lineup.steps
            )
        for name, steps in found.items():
            own = lineup.settings.setdefault(dense_with(steps).name, {})
            own.setdefault("equal_time_to", []).append(name)

    def row(
        self,
        method: Method,
        *,
        metrics: Mapping[str, MetricValue],
        density: float | None,
        cost: float | None,
        folder: str | None = None,
    ) -> Row:
        """Return the row of a method that ran; arguments as in `rows.build_row`."""
        if method.cost is not None:
            cost = method.cost * self.lineup.steps
        return build_row(
            method,
            steps=method.num_inference_steps or self.lineup.steps,
            calls=self.calls[method.name],
            reference=timing([x["seconds"] for x in self.calls[DENSE.name]]),
            settings=self.lineup.settings.get(method.name),
            metrics=metrics,
            density=density,
            cost=cost,
            folder=folder,
        )

    def missing_row(self, method: Method) -> Row:
        """Return the row of a method that cannot run here."""
        assert method.why is not None
        steps = method.num_inference_steps or self.lineup.steps
        return unavailable_row(method.name, method.kind, method.why, num_inference_steps=steps)
