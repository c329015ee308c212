"""`run_evaluation`: every method's samples, seconds, memory and quality, in one table and one page."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_accel.checkpoint.file import SLACheckpoint
from dit_accel.checkpoint.identity import public_name
from dit_accel.config import RASConfig, SLAConfig
from dit_accel.eval.metrics.measurement import Measurement
from dit_accel.eval.metrics.networks import Networks
from dit_accel.eval.metrics.score import open_reference
from dit_accel.eval.results.store import build_results, write_results
from dit_accel.eval.results.types import Results
from dit_accel.eval.runs.lineup import line_up
from dit_accel.eval.runs.measured import MeasuredCalls
from dit_accel.eval.runs.methods import DEFAULT, DENSE, Crossover, Method, dense_with
from dit_accel.eval.runs.rivals import choose_settings
from dit_accel.eval.runs.scores import Scorer, choose_metrics
from dit_accel.eval.runs.stages import Stages
from dit_accel.eval.view.conditions import check_early
from dit_accel.eval.view.report import check_libraries, report
from dit_accel.sampling.plan import plan_samples
from dit_accel.sampling.prompts import PromptRecord
from dit_accel.sampling.set_plan import planned_set, shard_of
from dit_accel.sampling.sets import SampleSet
from dit_accel.sampling.settings import Sampling, check_count, with_steps


def run_evaluation(
    pipe: Any,
    prompts: Sequence[PromptRecord],
    *,
    output_dir: str | os.PathLike,
    model: str | os.PathLike,
    sampling: Sampling,
    methods: Sequence[str | Method] = DEFAULT,
    sla: SLAConfig | SLACheckpoint | dict | str = "balanced",
    ras: RASConfig | str = "balanced",
    crossover: Crossover | None = None,
    revision: str | None = None,
    seed: int = 0,
    batch_size: int = 1,
    repeats: int = 5,
    fine_steps: int | None = None,
    probes: Sequence[PromptRecord] = (),
    metrics: Sequence[str] | None = None,
    reference: SampleSet | Measurement | str | os.PathLike | None = None,
    networks: Networks | None = None,
    title: str | None = None,
    shown: int = 8,
    fps: float | int = 16.0,
    fail_if: Sequence[str] = (),
    overwrite: bool = False,
    progress: bool = True,
) -> Results:
    """Sample with every method, measure, and write results.json, table.md, grid.png and report.html.

    First step caches without a setting get one with which they cost what region-adaptive sampling costs.
    Then the sample sets are made, each in a sub-folder; then calls of one sample are measured, the
    methods taking turns; then dense sampling with the number of steps whose denoising takes the time of
    each accelerated method is sampled too. Started again after a kill, it goes on.

    Args:
        pipe: a loaded pipeline without acceleration.
        prompts: see `prompt_sets.load_prompts`.
        model, revision: what to write down as the model's name, and its commit.
        sampling: arguments of the pipeline calls.
        methods: see `methods.read_methods`. Dense sampling is always there.
        sla, ras: settings of methods that name none.
        crossover: overrides that of all sparse attention.
        seed: sample i has `seed + i`, as in `generate.generate`.
        batch_size: samples a pipeline call when sets are made; step caches take one. Seconds and memory
            are always measured with one.
        repeats: measured calls of each method, one prompt after the other.
        fine_steps: steps of a second reference, dense sampling from the same noise, with which the paired metrics
            compare each row too. None: no second reference.
        probes: prompts with which the cost of step caches is counted; see `rivals.choose_settings`.
        metrics: see `scores.choose_metrics`.
        reference: what FID and its like compare with: a folder of real pictures, or a saved
            measurement of it. None: the dense set, and their names say so.
        networks: weights that metrics need.
        title: of the report.
        shown: samples in page and grid.
        fps: of the clips.
        fail_if: conditions that the caller is going to `check`; refused where they name a figure or a row
            that there will not be.
        overwrite: replace samples in the folder that were made with other settings.
        progress: bars and notes on stderr.

    Raises:
        ValueError: bad input, before any work.
        RuntimeError: a sample could not be written. What is finished stays; run it again to go on.
    """
    if shard_of() != (0, 1):
        raise ValueError(
            "WORLD_SIZE: an evaluation runs in one process; accepted under torchrun is `eval generate`, into "
            "the sub-folders, which an evaluation then finds"
        )
    check_count("repeats", repeats)
    if shown < 0:
        raise ValueError(f"shown={shown}: accepted is a whole number >= 0")
    check_libraries()
    sampling = with_steps(pipe, sampling)
    samples = plan_samples(prompts, sampling, seed=seed, count=1, layout="ids")
    for sample in samples:
        pipe.check_sizes(**sample.sampling.call_arguments())
    assert sampling.num_inference_steps is not None
    lineup = line_up(
        methods, pipe, steps=sampling.num_inference_steps, sla=sla, ras=ras, crossover=crossover
    )
    if fine_steps is not None:
        check_fine(fine_steps, sampling.num_inference_steps)
    runnable = lineup.runnable
    measured = MeasuredCalls(pipe, samples, lineup)
    stages = Stages(
        pipe,
        prompts,
        samples,
        sampling,
        Path(output_dir),
        batch_size,
        {
            "model": model,
            "revision": revision,
            "seed": seed,
            "fps": fps,
            "overwrite": overwrite,
        },
        measured,
        progress,
    )
    against = open_reference(reference)
    networks = networks or Networks()
    names = choose_metrics(
        planned_set(pipe, samples),
        metrics,
        networks=networks,
        reference=against,
        fine=fine_steps is not None,
    )
    check_early(
        fail_if, metrics=names.figures, rows=[y for x in runnable for y in (x.name, x.kind)]
    )
    networks.loaded(names.needed)
    fine = [] if fine_steps is None else [dense_with(fine_steps)]
    given = [x for x in lineup.fewer if x.num_inference_steps is not None]
    for method in (*(x for x in runnable if x.tuned is None), *given, *fine):
        stages.check(method)
    measured.lineup = lineup = choose_settings(
        lineup, pipe, samples, prompts=probes, folder=Path(output_dir), progress=progress
    )
    for method in lineup.runnable:
        stages.check(method)
    for method in (*lineup.runnable, *fine):
        stages.make(method)
    finest = stages.sets.pop(fine[0].name) if fine else None
    stages.measure(repeats)
    for method in measured.fewer:
        stages.make(method)
    device = str(pipe._execution_device)
    options = {**networks.loaded(names.needed, device), "device": device, "progress": False}
    scorer = Scorer(names, stages.sets[DENSE.name], finest, against, options)
    name = public_name(model)
    results = build_results(
        title=title or f"{name}: what acceleration costs",
        model=name,
        sampling=sampling.call_arguments() | {"seed": seed},
        prompts=len(samples),
        repeats=repeats,
        rows=[stages.row(x, scorer) for x in lineup.rows(measured.fewer)],
        samples=[
            {"id": x.id, "prompt": x.record.prompt, "media": stages.media(x)} for x in samples
        ],
        fine=None
        if finest is None
        else {"num_inference_steps": fine_steps, "folder": finest.path.name},
    )
    write_results(output_dir, results)
    report(output_dir, samples=shown)
    return results


def check_fine(fine_steps: int, steps: int) -> None:
    """Raise ValueError for a fine run without more steps than dense sampling."""
    check_count("fine_steps", fine_steps)
    if fine_steps <= steps:
        raise ValueError(
            f"fine_steps={fine_steps}: accepted are more steps than the {steps} of dense sampling, or None"
        )
