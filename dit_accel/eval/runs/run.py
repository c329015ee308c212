"""`run_evaluation`: samples, seconds, memory and quality of every method, in one table and one page."""

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_accel import environment
from dit_accel.checkpoint.file import SLACheckpoint
from dit_accel.checkpoint.identity import public_name
from dit_accel.config import RASConfig, SLAConfig
from dit_accel.eval.metrics.measurement import Measurement
from dit_accel.eval.metrics.networks import Networks
from dit_accel.eval.metrics.score import load_networks, open_reference
from dit_accel.eval.results.store import build_results, write_results
from dit_accel.eval.results.types import Results, Row
from dit_accel.eval.runs.methods import DEFAULT, DENSE, Crossover, Method, dense_with, read_methods
from dit_accel.eval.runs.rivals import choose_settings
from dit_accel.eval.runs.rows import build_row
from dit_accel.eval.runs.scores import Metrics, Reference, Scorer, choose_metrics
from dit_accel.eval.runs.timing import Log, MeasuredCalls
from dit_accel.eval.view.conditions import check_early
from dit_accel.eval.view.report import check_libraries, report
from dit_accel.runtime.components import transformers_of
from dit_accel.sampling.acceleration import weights_sha256
from dit_accel.sampling.generate import check_generate, generate
from dit_accel.sampling.plan import Sample, plan_samples
from dit_accel.sampling.prompts import PromptRecord
from dit_accel.sampling.set_plan import planned_set, shard_of
from dit_accel.sampling.sets import SampleSet
from dit_accel.sampling.settings import Sampling, check_count, with_steps


@dataclass(kw_only=True)
class Evaluation:
    """Settings of an evaluation."""

    prompts: Sequence[PromptRecord]
    """Prompts, see `prompt_sets.load_prompts`."""
    output_dir: str | os.PathLike
    model: str | os.PathLike
    """Name of the model for the records."""
    sampling: Sampling
    """Arguments of the pipeline calls, with a number of steps."""
    methods: Sequence[str] = DEFAULT
    """Names of methods, see `methods.read_methods`. Dense sampling is always compared."""
    sla: SLAConfig | SLACheckpoint | dict | str = "balanced"
    """Sparse attention of methods whose name has no setting."""
    ras: RASConfig | str = "balanced"
    """Region-adaptive sampling of methods whose name has no setting."""
    crossover: Crossover | None = None
    """Replaces the crossover of all sparse attention."""
    revision: str | None = None
    """Commit of the model for the records."""
    seed: int = 0
    """Sample i has `seed + i`."""
    batch_size: int = 1
    """Samples per call when sets are made; step caches take 1. Measured calls always have 1."""
    repeats: int = 5
    """Measured calls of each method, one prompt after the other."""
    fine_steps: int | None = None
    """Steps of a second reference, dense sampling from the same noise, for the paired metrics. Default: none."""
    probes: Sequence[PromptRecord] = ()
    """Prompts on which the cost of step caches is counted, see `rivals.choose_settings`."""
    metrics: Sequence[str] | None = None
    """Names of metrics, see `scores.choose_metrics`."""
    reference: SampleSet | Measurement | str | os.PathLike | None = None
    """Real pictures for FID and similar metrics: a set, its folder, or a saved measurement. Default: the dense set."""
    networks: Networks = field(default_factory=Networks)
    """Weights that metrics need."""
    title: str | None = None
    """Title of the report."""
    shown: int = 8
    """Number of samples in page and grid."""
    fps: float | int = 16.0
    """Frame rate of clips."""
    fail_if: Sequence[str] = ()
    """Conditions that the caller will check; refused if they name a metric or row that there will not be."""
    overwrite: bool = False
    """Replace samples that were made with other settings."""
    progress: bool = True
    """Show bars and notes on stderr."""

    def check(self, pipe: Any) -> tuple[list[Sample], list[Method], Metrics, Reference | None]:
        """Check everything that needs no weights, and return samples, methods, metrics and reference.

        Args:
            pipe: a pipeline, or its outline.

        Raises:
            ValueError: bad input.
            ImportError: a library of the page is missing.
        """
        check_libraries()
        check_count("batch_size", self.batch_size)
        check_count("repeats", self.repeats)
        if self.shown < 0:
            raise ValueError(f"shown={self.shown}: must be an int >= 0")
        if self.fine_steps is not None:
            check_count("fine_steps", self.fine_steps)
            if self.fine_steps <= self.steps:
                raise ValueError(f"fine_steps={self.fine_steps}: must be more than {self.steps}")
        samples = plan_samples(self.prompts, self.sampling, seed=self.seed, count=1, layout="ids")
        for sample in samples:
            pipe.check_sizes(**sample.sampling.call_arguments())
        settings: dict[str, Any] = {"sla": self.sla, "ras": self.ras, "crossover": self.crossover}
        methods = read_methods(self.methods, pipe, steps=self.steps, **settings)
        planned, reference = planned_set(pipe, samples), open_reference(self.reference)
        options: dict[str, Any] = {"networks": self.networks, "reference": reference}
        options["fine"] = self.fine_steps is not None
        metrics = choose_metrics(planned, self.metrics, **options)
        rows = [y for x in methods if x.runs for y in (x.name, x.kind)]
        check_early(self.fail_if, metrics=metrics.names, rows=rows)
        return samples, methods, metrics, reference

    def run(self, pipe: Any) -> Results:
        """Evaluate a loaded pipeline without acceleration; see `run_evaluation`."""
        samples, methods, metrics, reference = self.check(pipe)
        methods = [x.tried(pipe, self.steps) for x in methods]
        networks = self.networks.arguments()
        load_networks(networks, metrics.needed)  # weights that cannot be read end the run here
        fine = [] if self.fine_steps is None else [dense_with(self.fine_steps)]
        for method in (*methods, *fine):
            if method.why is None and method.tuned is None and not method.at_equal_time:
                check_generate(pipe, self.prompts, **self._generated(method))
        folder = Path(self.output_dir)
        options: dict[str, Any] = {"prompts": self.probes, "progress": self.progress}
        methods = choose_settings(methods, pipe, samples, folder=folder, **options)
        runnable = [x for x in methods if x.runs]
        for method in runnable:
            check_generate(pipe, self.prompts, **self._generated(method))
        sets = {x.name: self._make(pipe, x) for x in (*runnable, *fine)}
        finest = sets.pop(fine[0].name) if fine else None
        log = Log(folder / "timings.json", self._about(pipe, samples, methods), "calls")
        # Samples of the first one's size, so that seconds can be compared.
        like = [x for x in samples if x.call == samples[0].call][: self.repeats]
        calls = MeasuredCalls(pipe, like, self.steps, log.results, lambda *_: log.write())
        fewer = calls.measure(methods, self.repeats, progress=self.progress)
        sets |= {x.name: self._make(pipe, x) for x in fewer}
        device = str(pipe._execution_device)
        options = {**load_networks(networks, metrics.needed, device), "device": device}
        scorer = Scorer(metrics, sets[DENSE.name], finest, reference, options | {"progress": False})
        accelerated = [x for x in methods if x.kind not in ("dense", "fewer_steps")]
        name, steps = public_name(self.model), self.fine_steps
        results = build_results(
            title=self.title or f"{name}: what acceleration costs",
            model=name,
            sampling=self.sampling.call_arguments() | {"seed": self.seed},
            prompts=len(samples),
            repeats=self.repeats,
            rows=[self._row(x, sets, calls, scorer) for x in (DENSE, *fewer, *accelerated)],
            samples=[
                {"id": x.id, "prompt": x.record.prompt, "media": _media(folder, sets, x.id)}
                for x in samples
            ],
            fine={"num_inference_steps": steps, "folder": finest.path.name} if finest else None,
        )
        write_results(folder, results)
        report(folder, samples=self.shown)
        return results

    @property
    def steps(self) -> int:
        """Number of steps of dense sampling."""
        assert self.sampling.num_inference_steps is not None
        return self.sampling.num_inference_steps

    def _generated(self, method: Method) -> dict[str, Any]:
        """Return the arguments of `generate`."""
        steps = method.num_inference_steps or self.steps
        return {
            "output_dir": Path(self.output_dir) / method.folder,
            "sampling": self.sampling.overridden(num_inference_steps=steps),
            "batch_size": 1 if method.cache is not None else self.batch_size,
            **{"rank": 0, "world_size": 1, "seed": self.seed, "fps": self.fps},
            **{"model": self.model, "revision": self.revision, "overwrite": self.overwrite},
            **method.acceleration,
        }

    def _make(self, pipe: Any, method: Method) -> SampleSet:
        """Make the sample set of a method, or the samples that are missing."""
        if self.progress:
            sys.stderr.write(f"{method.name}\n")
        made = generate(pipe, self.prompts, **self._generated(method), progress=self.progress)
        assert made is not None  # the only rank
        return made

    def _row(
        self, method: Method, sets: dict[str, SampleSet], calls: MeasuredCalls, scorer: Scorer
    ) -> Row:
        if method.why is not None:
            return build_row(method, calls)
        made, means = sets[method.name], {}
        for key in ("density", "cost"):
            records = made.manifest["samples"].values() if made.manifest else []
            values = [x[key] for x in records if x.get(key) is not None]
            means[key] = sum(values) / len(values) if values else None
        metrics = scorer.metric_values(made)
        return build_row(method, calls, metrics=metrics, folder=method.folder, **means)

    def _about(
        self, pipe: Any, samples: Sequence[Sample], methods: Sequence[Method]
    ) -> dict[str, Any]:
        """Return everything that the seconds depend on."""
        calls = [(x.record.prompt, x.seed, x.sampling.call_arguments()) for x in samples]
        return {
            "weights": weights_sha256(pipe),
            "dtype": str(transformers_of(pipe)[0].dtype),
            "device": str(pipe._execution_device),
            "machine": environment.machine(),
            "versions": environment.versions(),
            "samples_sha256": hashlib.sha256(repr(calls).encode()).hexdigest(),
            "methods": [[x.name, x.settings] for x in methods if x.why is None],
            "repeats": self.repeats,
        }


def _media(folder: Path, sets: dict[str, SampleSet], sample: str) -> dict[str, str]:
    return {name: x.media(sample).relative_to(folder).as_posix() for name, x in sets.items()}


def run_evaluation(pipe: Any, prompts: Sequence[PromptRecord], **settings: Any) -> Results:
    """Sample with every method, measure, and write results.json, table.md, grid.png and report.html.

    Step caches without a setting first get the one with which they cost as much as region-adaptive sampling. Then the
    sample sets are made, each in a sub-folder. Then calls of one sample are measured, the methods taking turns. Dense
    sampling with the number of steps whose denoising takes the time of each accelerated method is sampled last. A run
    that was killed goes on when it is started again.

    Args:
        pipe: a loaded pipeline without acceleration.
        prompts: see `prompt_sets.load_prompts`.
        **settings: fields of `Evaluation`; `output_dir`, `model` and `sampling` are needed.

    Raises:
        ValueError: bad input, before any work.
        RuntimeError: a sample could not be written. Finished samples stay; run it again to go on.
    """
    if shard_of() != (0, 1):
        raise ValueError(
            "WORLD_SIZE: an evaluation runs in one process; under torchrun, fill its sub-folders with `eval generate`"
        )
    settings["sampling"] = with_steps(pipe, settings["sampling"])
    return Evaluation(prompts=prompts, **settings).run(pipe)
