"""The stages of an evaluation: sample sets of every method, measured calls, and rows of the two."""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_accel.environment import machine, versions
from dit_accel.eval.results.types import Row
from dit_accel.eval.runs.fewer_steps import measure_all
from dit_accel.eval.runs.methods import DENSE, Method, dense_with
from dit_accel.eval.runs.rows import build_row, mean_of, timing, unavailable_row
from dit_accel.eval.runs.scores import Scorer
from dit_accel.eval.runs.timing import Request, Stopwatch
from dit_accel.eval.runs.timing_log import TimingLog
from dit_accel.sampling.acceleration import weights_sha256
from dit_accel.sampling.batches import progress_bar, quiet
from dit_accel.sampling.generate import check_generate, generate
from dit_accel.sampling.pipeline_call import Sampling
from dit_accel.sampling.plan import Sample
from dit_accel.sampling.prompts import PromptRecord
from dit_accel.sampling.sets import SampleSet


@dataclass
class Stages:
    """What is at hand, and what has been made so far."""

    pipe: Any
    prompts: Sequence[PromptRecord]
    samples: Sequence[Sample]
    sampling: Sampling
    """With a number of steps."""
    folder: Path
    batch_size: int
    options: Mapping[str, Any]
    """Further arguments of `generate`."""
    progress: bool
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of the methods, by name, as rows show them."""
    sets: dict[str, SampleSet] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Of dense sampling."""
        assert self.sampling.num_inference_steps is not None
        return self.sampling.num_inference_steps

    def check(self, method: Method) -> None:
        """Raises ValueError if `make` would, before any method is made."""
        check_generate(self.pipe, self.prompts, **self._generated(method))

    def make(self, method: Method) -> None:
        """Its sample set, or what is missing of it."""
        if self.progress:
            sys.stderr.write(f"{method.name}\n")
        made = generate(self.pipe, self.prompts, **self._generated(method), progress=self.progress)
        assert made is not None  # the only rank
        self.sets[method.name] = made

    def _generated(self, method: Method) -> dict[str, Any]:
        """Arguments of `generate`."""
        sampling = self.sampling
        if method.num_inference_steps is not None:
            sampling = sampling.overridden(num_inference_steps=method.num_inference_steps)
        return {
            "output_dir": self.folder / method.folder,
            "sampling": sampling,
            "batch_size": 1 if method.cache is not None else self.batch_size,
            "rank": 0,
            "world_size": 1,
            **method.acceleration,
            **self.options,
        }

    def measure(
        self, methods: Sequence[Method], fewer: Sequence[Method], repeats: int
    ) -> tuple[Stopwatch, list[Method]]:
        """Calls of every method, and of dense sampling with fewer steps.

        Args:
            methods: dense sampling and the accelerated ones.
            fewer: with their numbers of steps; one without a number stands for those that take the time
                of each accelerated method.

        Returns:
            The measurements, and the dense methods with fewer steps that belong into the table.
        """
        with (
            progress_bar(desc="timing", unit="call", disable=not self.progress) as bar,
            quiet(self.pipe),
        ):
            log = TimingLog(self.folder, self._about([*methods, *fewer], repeats))

            def on_call(*_: Any) -> None:
                log.write()
                bar.update()

            watch = Stopwatch(self.pipe, self._requests(repeats), calls=log.calls, on_call=on_call)
            rows, found = measure_all(watch, methods, fewer, repeats, steps=self.steps)
        for name, steps in found.items():
            own = self.settings.setdefault(dense_with(steps).name, {})
            own.setdefault("equal_time_to", []).append(name)
        return watch, rows

    def row(self, method: Method, watch: Stopwatch, scorer: Scorer) -> Row:
        """Everything about a method."""
        steps = method.num_inference_steps or self.steps
        if method.why is not None:
            return unavailable_row(method.name, method.kind, method.why, num_inference_steps=steps)
        made = self.sets[method.name]
        assert made.manifest is not None
        records = list(made.manifest["samples"].values())
        dense = timing([x["seconds"] for x in watch.calls[DENSE.name]])
        return build_row(
            method,
            steps=steps,
            calls=watch.calls[method.name],
            reference=dense,
            settings=self.settings.get(method.name),
            metrics=scorer.figures(made),
            density=mean_of(records, "density"),
            cost=mean_of(records, "cost"),
            folder=method.folder,
        )

    def media(self, sample: Sample) -> dict[str, str]:
        """What each row made of a sample, relative to the folder."""
        return {
            name: made.media(sample.id).relative_to(self.folder).as_posix()
            for name, made in self.sets.items()
        }

    def _requests(self, repeats: int) -> list[Request]:
        """Prompts of the first one's size."""
        like = [x for x in self.samples if x.call == self.samples[0].call]
        return [Request(x.record.prompt, x.sampling, x.seed) for x in like[:repeats]]

    def _about(self, methods: Sequence[Method], repeats: int) -> dict[str, Any]:
        """What seconds depend on."""
        samples = [(x.record.prompt, x.seed, x.sampling.call_arguments()) for x in self.samples]
        transformer = self.pipe.transformer
        return {
            "weights": weights_sha256(self.pipe),
            "dtype": str(transformer.dtype),
            "device": str(self.pipe._execution_device),
            "machine": machine(),
            "versions": versions(),
            "samples_sha256": hashlib.sha256(repr(samples).encode()).hexdigest(),
            "methods": [[x.name, self.settings[x.name]] for x in methods],
            "repeats": repeats,
        }
