"""Plan of a sample set: checked arguments, samples, batches and the share of each rank."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.checkpoint.file import SLACheckpoint
from dit_accel.checkpoint.identity import public_name
from dit_accel.config import RASConfig, SLAConfig
from dit_accel.files import check_writable
from dit_accel.runtime.components import transformers_of
from dit_accel.sampling.acceleration import accelerated, acceleration_settings, weights_sha256
from dit_accel.sampling.call import ONE_PROMPT, media_kind
from dit_accel.sampling.journal import EarlierRuns, Shards, known_samples
from dit_accel.sampling.plan import VBENCH_SAMPLES, Layout, Sample, plan_batches, plan_samples
from dit_accel.sampling.prompts import PromptRecord, prompts_sha256
from dit_accel.sampling.sample_files import check_free
from dit_accel.sampling.sets import SampleSet
from dit_accel.sampling.settings import Kind, Sampling, check_count, check_fps, with_steps

_CLIP = 81
"""Default number of frames of video pipelines."""


@dataclass(frozen=True)
class SetPlan:
    """Work of one rank on a sample set."""

    folder: Path
    kind: Kind
    settings: dict[str, Any]
    """Settings that the samples depend on, as in the manifest."""
    samples: list[Sample]
    """Samples of all ranks."""
    batches: list[list[Sample]]
    """Batches of all ranks."""
    shards: Shards
    found: EarlierRuns
    """Samples of earlier runs."""

    @property
    def own(self) -> list[Sample]:
        """Samples of this rank."""
        return [x for x in self.samples if self.shards.owner[x.id] == self.shards.rank]

    @property
    def own_batches(self) -> list[list[Sample]]:
        """Batches of this rank."""
        return self.batches[self.shards.rank :: self.shards.world_size]


@contextlib.contextmanager
def planned(
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
    sla: SLAConfig | SLACheckpoint | dict | str | None,
    ras: RASConfig | dict | str | None,
    cache: Any,
    rank: int | None,
    world_size: int | None,
    overwrite: bool,
) -> Iterator[SetPlan]:
    """Check the arguments, enable acceleration inside the block, and yield the plan.

    Args:
        pipe, prompts: as in `generate.generate`, and so are all other arguments.

    Raises:
        ValueError: an argument is invalid, or the folder contains other files.
    """
    check_fps(fps)
    check_count("batch_size", batch_size)
    if samples_per_prompt is not None:
        check_count("samples_per_prompt", samples_per_prompt)
    rank, world_size = shard_of(rank, world_size)
    kind = media_kind(pipe)
    if layout not in ("ids", "vbench"):
        raise ValueError(f"layout={layout!r}: must be ids or vbench")
    if layout == "vbench" and kind == "images":
        raise ValueError(
            "layout='vbench': needs a model that generates clips, and this model generates images"
        )
    if cache is not None and batch_size > 1:
        raise ValueError(
            f"batch_size={batch_size}: must be 1 with cache, because a step cache makes one decision for all samples of a "
            "call, so that the samples would depend on each other"
        )
    if batch_size > 1 and type(pipe).__name__ in ONE_PROMPT:
        raise ValueError(
            f"batch_size={batch_size}: must be 1, because {type(pipe).__name__} of diffusers takes one prompt per call"
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
            "dtype": str(transformers_of(pipe)[0].dtype).removeprefix("torch."),
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
        plan = SetPlan(folder, kind, settings, samples, batches, shards, found)
        if found.samples is None and not overwrite:
            check_free(folder, plan.own, samples, kind)
        yield plan


def planned_set(pipe: Any, samples: Sequence[Sample]) -> SampleSet:
    """Return the future sample set of these samples without files. Metrics use it to check what they can measure."""
    kind = media_kind(pipe)
    frames = {x.id: (x.sampling.num_frames or _CLIP) if kind == "clips" else 1 for x in samples}
    return SampleSet(
        Path(),
        kind,
        {name: tuple(Path(str(i)) for i in range(n)) for name, n in frames.items()},
        {x.id: x.record.prompt for x in samples},
    )


def shard_of(rank: int | None = None, world_size: int | None = None) -> tuple[int, int]:
    """Return the rank and the number of ranks.

    Args:
        rank, world_size: values to use. Default: RANK and WORLD_SIZE of the environment, else 0 and 1.

    Raises:
        ValueError: only one argument is given, a variable is not a number, or the rank is out of range.
    """
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank={rank}, world_size={world_size}: must be given together")
    if rank is None or world_size is None:
        values = [os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")]
        try:
            rank, world_size = map(int, values)
        except ValueError:
            raise ValueError(
                f"RANK={values[0]!r}, WORLD_SIZE={values[1]!r}: must be ints"
            ) from None
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank={rank}, world_size={world_size}: must have 0 <= rank < world_size")
    return rank, world_size
