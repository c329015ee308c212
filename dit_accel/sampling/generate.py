"""Prompts to a sample set: batches, shards, and a run that goes on where it was killed."""

import contextlib
import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.checkpoint.file import SLACheckpoint
from dit_accel.checkpoint.identity import public_name
from dit_accel.config import RASConfig, SLAConfig
from dit_accel.environment import machine, versions
from dit_accel.files import check_writable
from dit_accel.sampling.acceleration import accelerated, acceleration_settings, weights_sha256
from dit_accel.sampling.batches import BatchRun, progress_bar, quiet
from dit_accel.sampling.journal import Found, Journal, Shards, known_samples, merge
from dit_accel.sampling.pipeline_call import Sampling, resolved_device, with_steps
from dit_accel.sampling.plan import VBENCH_SAMPLES, Layout, Sample, plan_batches, plan_samples
from dit_accel.sampling.prompts import PromptRecord, prompts_sha256
from dit_accel.sampling.sample_files import check_free, is_intact, remove_old
from dit_accel.sampling.sets import FORMAT_VERSION, Kind, SampleSet

_CLIP = 81
"""Frames that video pipelines make by default."""


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
    sla: SLAConfig | SLACheckpoint | str | None = None,
    ras: RASConfig | str | None = None,
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
        pipe: a loaded pipeline (see `pipelines.generate.load`).
        prompts: see `dit_accel.sampling.prompts.read_prompts`; their sizes and negative prompts win over `sampling`.
        output_dir: gets `<id>.png` of an image, and of a clip `<id>/0000.png, ...` (what metrics read) and
            `<id>.mp4` (for looking).
        model, revision: what to write down as the model's name, and its commit.
        sampling: arguments of the pipeline calls; the pipeline's own number of steps where none is given.
        seed: sample i of all of them has `seed + i`; one with a seed of its own keeps that.
        batch_size: samples a pipeline call; only samples of one size share a call.
        samples_per_prompt: with more than one the ids get "-0", "-1", ... Default: 1, for VBench 5.
        fps: of the mp4.
        layout: "vbench" puts the mp4 files into `vbench/<prompt>-<i>.mp4`, where VBench finds them.
        sla, ras: acceleration for this run only; None leaves the pipeline as it is.
        cache: a cache config of diffusers for this run only, such as `FirstBlockCacheConfig`.
        rank, world_size: which share of the batches to make: b with b % world_size == rank. Default:
            RANK and WORLD_SIZE of the environment, as torchrun sets them.
        overwrite: replace samples that were made with other settings; without it they are an error.
            Samples of the same settings are kept either way.
        warm_up: one call before the first one, so that its seconds are like the others'.
        progress: bars on stderr.

    Returns:
        The set, or None while other ranks have samples to make.

    Raises:
        ValueError: bad input, before anything is written.
        RuntimeError: a sample could not be written, or came out as something that is no picture. What is
            finished stays; run it again to go on.
    """
    with _planned(
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
            with Journal(folder, shards, header, kept, redo=damaged) as journal, quiet(pipe):
                bar = {"desc": f"{label}generating", "disable": not progress}
                run = BatchRun(pipe, folder, plan.kind, fps, journal)
                own = plan.batches[shards.rank :: shards.world_size]
                run.make(own, kept, warm_up=warm_up, bar=bar)
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
        with _planned(**arguments.arguments):
            pass
    finally:
        for place in new:  # where a file can be written shows only in a folder that is there
            with contextlib.suppress(OSError):
                place.rmdir()


@dataclass(frozen=True)
class _Plan:
    """What a run has to do."""

    folder: Path
    kind: Kind
    settings: dict[str, Any]
    """What samples depend on."""
    samples: list[Sample]
    batches: list[list[Sample]]
    shards: Shards
    found: Found

    @property
    def own(self) -> list[Sample]:
        """Samples of this rank."""
        return [x for x in self.samples if self.shards.owner[x.id] == self.shards.rank]


@contextlib.contextmanager
def _planned(
    pipe: Any,
    prompts: Sequence[PromptRecord],
    *,
    output_dir: str | os.PathLike,
    model: str | os.PathLike,
    sampling: Sampling,
    revision: str | None,
    seed: int,
    batch_size: int,
    samples_per_prompt: int | None,
    fps: float | int,
    layout: Layout,
    sla: SLAConfig | SLACheckpoint | str | None,
    ras: RASConfig | str | None,
    cache: Any,
    rank: int | None,
    world_size: int | None,
    overwrite: bool,
) -> Iterator[_Plan]:
    """With the acceleration on, and everything checked."""
    _check_numbers(fps=fps, seed=seed, batch_size=batch_size, samples_per_prompt=samples_per_prompt)
    rank, world_size = shard_of(rank, world_size)
    kind = _kind(pipe)
    if layout not in ("ids", "vbench"):
        raise ValueError(f"layout={layout!r}: accepted are ids, vbench")
    if layout == "vbench" and kind == "images":
        raise ValueError("layout='vbench': VBench judges clips, and this model makes images")
    if cache is not None and batch_size > 1:
        raise ValueError(
            f"batch_size={batch_size}: a step cache decides for all samples of a call at once, so they would "
            "depend on each other; accepted with cache is 1"
        )
    count = samples_per_prompt or (VBENCH_SAMPLES if layout == "vbench" else 1)
    sampling = with_steps(pipe, sampling)
    samples = plan_samples(prompts, sampling, seed=seed, count=count, layout=layout)
    for used in {x.call: x.sampling for x in samples}.values():
        pipe.check_sizes(**used.call_arguments())
    batches = plan_batches(samples, batch_size)
    ranks = {x.id: b % world_size for b, batch in enumerate(batches) for x in batch}
    shards = Shards({x.id: ranks[x.id] for x in samples}, rank=rank, world_size=world_size)
    with accelerated(pipe, sla=sla, ras=ras, cache=cache):
        settings = {
            "kind": kind,
            "model": public_name(model),
            "revision": revision,
            "weights": weights_sha256(pipe),
            "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
            "sampling": sampling.call_arguments(),
            "seed": seed,
            "acceleration": acceleration_settings(pipe),
            "fps": fps,
            "layout": layout,
            "samples_per_prompt": count,
            "prompts_sha256": prompts_sha256(prompts),
        }
        folder = check_writable(output_dir, "output_dir")
        found = known_samples(folder, settings, overwrite=overwrite)
        plan = _Plan(folder, kind, settings, samples, batches, shards, found)
        if found.samples is None and not overwrite:
            check_free(folder, plan.own, samples, kind)
        yield plan


def planned_set(pipe: Any, samples: Sequence[Sample]) -> SampleSet:
    """The set that is going to be made of these, to ask what can be measured of it."""
    kind = _kind(pipe)
    frames = {x.id: (x.sampling.num_frames or _CLIP) if kind == "clips" else 1 for x in samples}
    return SampleSet(
        Path(),
        kind,
        {name: tuple(Path(str(i)) for i in range(n)) for name, n in frames.items()},
        {x.id: x.record.prompt for x in samples},
    )


def shard_of(rank: int | None = None, world_size: int | None = None) -> tuple[int, int]:
    """Rank and number of ranks: as given, else those of torchrun, else one process."""
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank={rank}, world_size={world_size}: accepted are both or neither")
    if rank is None or world_size is None:
        values = [os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")]
        try:
            rank, world_size = map(int, values)
        except ValueError:
            raise ValueError(f"RANK={values[0]!r}, WORLD_SIZE={values[1]!r}: no numbers") from None
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"rank={rank}, world_size={world_size}: accepted is 0 <= rank < world_size"
        )
    return rank, world_size


def rank_device(device: str = "auto") -> str:
    """The device of this process: under torchrun each has a GPU of its own."""
    local = os.environ.get("LOCAL_RANK")
    chosen = resolved_device(device)
    return f"cuda:{local}" if chosen == "cuda" and local else chosen


def _kind(pipe: Any) -> Kind:
    return "clips" if hasattr(pipe, "vae_scale_factor_temporal") else "images"


def _check_numbers(
    *, fps: float | int, seed: int, batch_size: int, samples_per_prompt: int | None
) -> None:
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps={fps}: accepted is a number > 0")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r}: accepted is an int >= 0")
    for name, value in (("batch_size", batch_size), ("samples_per_prompt", samples_per_prompt)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name}={value!r}: accepted is an int >= 1")


def _note_renamed(samples: Sequence[Sample]) -> None:
    if samples:
        sys.stderr.write(
            f"note: {len(samples)} clips cannot have their prompt as a file name, and VBench will not find "
            f"them; the first is {samples[0].record.prompt!r}\n"
        )
