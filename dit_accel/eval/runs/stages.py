"""The stages of an evaluation: sample sets of every method, measured calls, and rows of the two."""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_accel.environment import machine, versions
from dit_accel.eval.results.types import Row
from dit_accel.eval.runs.log import timing_log
from dit_accel.eval.runs.measured import MeasuredCalls
from dit_accel.eval.runs.methods import Method
from dit_accel.eval.runs.rows import mean_of
from dit_accel.eval.runs.scores import Scorer
from dit_accel.runtime.components import transformers_of
from dit_accel.sampling.acceleration import weights_sha256
from dit_accel.sampling.generate import check_generate, generate
from dit_accel.sampling.plan import Sample
from dit_accel.sampling.prompts import PromptRecord
from dit_accel.sampling.sets import SampleSet
from dit_accel.sampling.settings import Sampling


@dataclass
class Stages:
    """Inputs of an evaluation, and what has been made so far."""

    pipe: Any
    prompts: Sequence[PromptRecord]
    samples: Sequence[Sample]
    sampling: Sampling
    """With a number of steps."""
    folder: Path
    batch_size: int
    options: Mapping[str, Any]
    """Further arguments of `generate`."""
    measured: MeasuredCalls
    progress: bool
    sets: dict[str, SampleSet] = field(default_factory=dict)

    def check(self, method: Method) -> None:
        """Raise ValueError if `make` would, before any method is made."""
        check_generate(self.pipe, self.prompts, **self._generated(method))

    def make(self, method: Method) -> None:
        """Make the sample set of a method, or what is missing of it."""
        if self.progress:
            sys.stderr.write(f"{method.name}\n")
        made = generate(self.pipe, self.prompts, **self._generated(method), progress=self.progress)
        assert made is not None  # the only rank
        self.sets[method.name] = made

    def _generated(self, method: Method) -> dict[str, Any]:
        """Return the arguments of `generate`."""
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

    def measure(self, repeats: int) -> None:
        """Measure every method; calls of a run that was killed are kept."""
        log = timing_log(self.folder, self._about(repeats))
        self.measured.calls = log.results
        self.measured.measure(repeats, on_call=lambda *_: log.write(), progress=self.progress)

    def row(self, method: Method, scorer: Scorer) -> Row:
        """Return the table row of a method."""
        if method.why is not None:
            return self.measured.missing_row(method)
        made = self.sets[method.name]
        assert made.manifest is not None
        records = list(made.manifest["samples"].values())
        return self.measured.row(
            method,
            metrics=scorer.figures(made),
            density=mean_of(records, "density"),
            cost=mean_of(records, "cost"),
            folder=method.folder,
        )

    def media(self, sample: Sample) -> dict[str, str]:
        """Return the files that each row made of a sample, relative to the folder."""
        return {
            name: made.media(sample.id).relative_to(self.folder).as_posix()
            for name, made in self.sets.items()
        }

    def _about(self, repeats: int) -> dict[str, Any]:
        """Return everything that the seconds depend on."""
        samples = [(x.record.prompt, x.seed, x.sampling.call_arguments()) for x in self.samples]
        transformer, lineup = transformers_of(self.pipe)[0], self.measured.lineup
        return {
            "weights": weights_sha256(self.pipe),
            "dtype": str(transformer.dtype),
            "device": str(self.pipe._execution_device),
            "machine": machine(),
            "versions": versions(),
            "samples_sha256": hashlib.sha256(repr(samples).encode()).hexdigest(),
            "methods": [
                [x.name, lineup.settings[x.name]] for x in [*lineup.runnable, *lineup.fewer]
            ],
            "repeats": repeats,
        }
