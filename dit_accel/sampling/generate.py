"""Generation of a sample set in batches and shards. An interrupted run can be resumed."""

import contextlib
import errno
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_accel.checkpoint.file import SLACheckpoint
from dit_accel.config import RASConfig, SLAConfig
from dit_accel.environment import machine, versions
from dit_accel.files import naming_failures
from dit_accel.sampling.batches import progress_bar, quiet, run_batches
from dit_accel.sampling.call import BatchResult
from dit_accel.sampling.journal import Journal, Record, merge
from dit_accel.sampling.manifest import FORMAT_VERSION
from dit_accel.sampling.plan import Layout, Sample
from dit_accel.sampling.prompts import PromptRecord
from dit_accel.sampling.sample_files import frames_sha256, is_intact, remove_old, write_sample
from dit_accel.sampling.set_plan import SetPlan, planned
from dit_accel.sampling.sets import SampleSet
from dit_accel.sampling.settings import Sampling

_DISTURBED = (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST)
"""Errors that occur if another process for the same samples removes our temporary files or writes the files first."""


def generate(
    pipe: Any,
    prompts: Sequence[PromptRecord],
    *,
    output_dir: str | os.PathLike,
    model: str | os.PathLike,
    sampling: Sampling,
    revision: str | None = None,
    seed: int = 0,
    batch_size: int = 1,
    samples_per_prompt: int | None = None,
    fps: float | int = 16.0,
    layout: Layout = "ids",
    sla: SLAConfig | SLACheckpoint | dict | str | None = None,
    ras: RASConfig | dict | str | None = None,
    cache: Any = None,
    rank: int | None = None,
    world_size: int | None = None,
    overwrite: bool = False,
    warm_up: bool = False,
    progress: bool = True,
) -> SampleSet | None:
    """Generate the samples of a set that do not exist yet. A second call with the same arguments resumes an interrupted run.

    A sample depends on its prompt, its seed and the settings. Its noise does not depend on the rank or on the other
    samples of its batch. Another batch size changes only the rounding of sums.

    Args:
        pipe: a loaded pipeline (see `load.load_pipeline`).
        prompts: prompt records (see `prompts.read_prompts`). Their sizes and negative prompts override `sampling`.
        output_dir: folder for the samples: `<id>.png` for an image; `<id>/0000.png, ...` (read by metrics) and
            `<id>.mp4` for a clip.
        model, revision: name and commit of the model, recorded in the manifest.
        sampling: arguments of the pipeline calls. Default number of steps: that of the pipeline.
        seed: seed of the first sample. Sample i has `seed + i`, unless its prompt has its own seed.
        batch_size: number of samples per pipeline call. Only samples of one size share a call.
        samples_per_prompt: number of samples of each prompt. With more than one, "-0", "-1", ... is appended to the id.
            Default: 5 with the layout "vbench", else 1.
        fps: frame rate of the mp4 files.
        layout: "ids" names files by id. "vbench" writes the mp4 files to `vbench/<prompt>-<i>.mp4`, where VBench reads
            them.
        sla, ras: acceleration for this run only. None leaves the pipeline as it is.
        cache: a cache config of diffusers for this run only, such as `FirstBlockCacheConfig`.
        rank, world_size: share of this process: the batches b with b % world_size == rank. Default: RANK and WORLD_SIZE
            of the environment, as torchrun sets them.
        overwrite: replace samples that were generated with other settings. Otherwise such samples raise ValueError.
            Samples with the same settings are always kept.
        warm_up: run one additional call first, so that one-time work is not part of the measured seconds.
        progress: show progress bars on stderr.

    Returns:
        The sample set, or None if other ranks are not finished.

    Raises:
        ValueError: an argument is invalid; nothing is written.
        RuntimeError: a sample could not be written, or its values are not finite. Finished samples are kept; run the call
            again to resume.
    """
    with planned(
        pipe,
        prompts,
        output_dir=output_dir,
        model=model,
        sampling=sampling,
        revision=revision,
        seed=seed,
        batch_size=batch_size,
        samples_per_prompt=samples_per_prompt,
        fps=fps,
        layout=layout,
        sla=sla,
        ras=ras,
        cache=cache,
        rank=rank,
        world_size=world_size,
        overwrite=overwrite,
    ) as plan:
        folder, shards = plan.folder, plan.shards
        remove_old(folder, plan.found, plan.samples, shards, plan.kind)
        _note_renamed([x for x in plan.own if x.renamed])
        known = plan.found.samples or {}
        kept = {name: x for name, x in known.items() if name in shards.owner}
        label = f"rank {shards.rank}, " if shards.world_size > 1 else ""
        there = [x.id for x in plan.own if x.id in kept]
        checked = progress_bar(
            iterable=there, desc=f"{label}checking", disable=not (progress and there)
        )
        damaged = [name for name in checked if not is_intact(folder, kept[name])]
        for name in damaged:
            del kept[name]
        if any(x.id not in kept for x in plan.own):
            header = {"format_version": FORMAT_VERSION, **plan.settings}
            header |= {"device": str(pipe._execution_device)}
            header |= {"versions": versions(), "machine": machine()}
            bar = {"desc": f"{label}generating", "disable": not progress}
            with Journal(folder, shards, header, kept, redo=damaged) as journal, quiet(pipe):
                _make(pipe, plan, kept, journal, warm_up=warm_up, bar=bar)
    return SampleSet.open(folder) if merge(folder, plan.settings, shards) else None


def check_generate(pipe: Any, prompts: Sequence[PromptRecord], **options: Any) -> None:
    """Check the arguments of `generate` without sampling. Nothing is written.

    Args:
        pipe, prompts, options: as in `generate`.

    Raises:
        ValueError: an argument is invalid, or output_dir contains other files.
    """
    arguments = inspect.signature(generate).bind(pipe, prompts, **options)
    arguments.apply_defaults()
    for name in ("warm_up", "progress"):
        del arguments.arguments[name]
    folder = Path(arguments.arguments["output_dir"])
    new = [x for x in (folder, *folder.parents) if not os.path.exists(x)]
    try:
        with planned(**arguments.arguments):
            pass
    finally:
        for place in new:  # the check for write access creates the folder
            with contextlib.suppress(OSError):
                place.rmdir()


def _make(
    pipe: Any,
    plan: SetPlan,
    kept: dict[str, Record],
    journal: Journal,
    *,
    warm_up: bool,
    bar: dict[str, Any],
) -> None:
    """Run every batch that has a missing sample, and write the missing samples.

    A batch always runs with all its samples, because the rounding of a sample depends on the batch size. The result is
    then bit-identical to that of an uninterrupted run.
    """
    batches = plan.own_batches
    total = sum(len(batch) for batch in batches)
    done = sum(x.id in kept for batch in batches for x in batch)
    missing = [batch for batch in batches if any(x.id not in kept for x in batch)]
    with progress_bar(total=total, initial=done, **bar) as samples:
        for made in run_batches(pipe, missing, warm_up=warm_up):
            for i, sample in enumerate(made.samples):
                if sample.id not in kept:
                    journal.append(sample.id, _write(plan, made, i))
                    samples.update()


def _write(plan: SetPlan, made: BatchResult, i: int) -> Record:
    """Write the files of one sample and return its entry for the manifest."""
    sample, pictures, summary = made.samples[i], made.pictures(i), made.summary
    advice = (
        f"sample {sample.id!r} is unfinished, finished samples are kept; run it again to resume"
    )
    options: dict[str, Any] = {"kind": plan.kind, "fps": plan.settings["fps"]}
    with naming_failures(advice):
        try:
            files = write_sample(plan.folder, sample, pictures, **options)
        except OSError as error:
            if error.errno not in _DISTURBED:
                raise
            files = write_sample(plan.folder, sample, pictures, **options)
    return {
        "prompt": sample.record.prompt,
        "negative_prompt": sample.sampling.negative_prompt,
        "seed": sample.seed,
        "ref_path": sample.record.ref_path,
        "frames": list(pictures.shape),
        "files": files,
        "sha256": frames_sha256(pictures),
        "seconds": {phase: took / len(made.samples) for phase, took in made.seconds.items()},
        "density": summary.overall_density,
        "sparse_density": summary.density,
        "cost": None if summary.ras is None else summary.ras.cost,
        "batch": len(made.samples),
    }


def _note_renamed(samples: Sequence[Sample]) -> None:
    """Write a note to stderr about clips that VBench cannot find by their prompt."""
    if samples:
        sys.stderr.write(
            f"note: {len(samples)} clips have prompts that are not valid file names, and VBench will not find "
            f"them; the first is {samples[0].record.prompt!r}\n"
        )
