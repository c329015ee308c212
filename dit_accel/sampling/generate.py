"""`generate`: prompts to a sample set, in batches and shards; a run that was killed goes on."""

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
"""Errors where another process, started for the same samples, has swept temporary files or was faster."""


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
    """Generate the samples that are not there yet; started again after a kill, it goes on.

    A sample depends on its prompt, its seed and the settings. Neither the rank nor the other samples of
    its batch change its noise; another batch size only changes how sums are rounded.

    Args:
        pipe: a loaded pipeline (see `load.load_pipeline`).
        prompts: see `prompts.read_prompts`; their sizes and negative prompts win over `sampling`.
        output_dir: gets `<id>.png` of an image, and of a clip `<id>/0000.png, ...` (what metrics read) and
            `<id>.mp4` (for looking).
        model, revision: name of the model for the manifest, and its commit.
        sampling: arguments of the pipeline calls; the pipeline's own number of steps where none is given.
        seed: sample i of all of them has `seed + i`; one with a seed of its own keeps that.
        batch_size: samples a pipeline call; only samples of one size share a call.
        samples_per_prompt: with more than one the ids get "-0", "-1", ... Default: 1, for VBench 5.
        fps: frame rate of the mp4.
        layout: "vbench" puts the mp4 files into `vbench/<prompt>-<i>.mp4`, where VBench finds them.
        sla, ras: acceleration for this run only; None leaves the pipeline as it is.
        cache: a cache config of diffusers for this run only, such as `FirstBlockCacheConfig`.
        rank, world_size: which share of the batches to make: b with b % world_size == rank. Default:
            RANK and WORLD_SIZE of the environment, as torchrun sets them.
        overwrite: replace samples that were made with other settings; without it they are an error.
            Samples of the same settings are kept either way.
        warm_up: one call before the first one, so that its seconds are like the others'.
        progress: show bars on stderr.

    Returns:
        The set, or None while other ranks have samples to make.

    Raises:
        ValueError: bad input, before anything is written.
        RuntimeError: a sample could not be written, or came out as something that is no picture. What is
            finished stays; run it again to go on.
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
    """Raise what `generate` would raise before its first write; nothing is sampled, and nothing stays.

    Args:
        options: as in `generate`.

    Raises:
        ValueError: bad input, or an output_dir that holds something else.
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
        for place in new:  # where a file can be written shows only in a folder that is there
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
    """Make every batch with a sample that is missing, and write the missing samples.

    A batch runs as a whole: the company of the missing samples, and with it the last bits of the result,
    are then those of a run that was never killed.
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
    """Write the files of one sample; return its entry in the manifest."""
    sample, pictures, summary = made.samples[i], made.pictures(i), made.summary
    advice = f"sample {sample.id!r} is unfinished, what is finished stays; run it again to go on"
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
    if samples:
        sys.stderr.write(
            f"note: {len(samples)} clips cannot have their prompt as a file name, and VBench will not find "
            f"them; the first is {samples[0].record.prompt!r}\n"
        )
