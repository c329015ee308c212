"""Samples of a run with their ids, seeds and file names, and their division into batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dit_accel.sampling.names import name_key, unique_names
from dit_accel.sampling.prompts import PromptRecord
from dit_accel.sampling.settings import Sampling, check_seed

Layout = Literal["ids", "vbench"]
VBENCH_SAMPLES = 5
"""Clips per prompt that VBench requires. Its dimension temporal_flickering requires 25."""
VBENCH_FOLDER = "vbench"
"""Folder for mp4 files only, because VBench takes the suffix of all videos from the first file that it finds."""
_VIDEO_NAME_BYTES = 250
"""Longer than `names.MAX_BYTES`, because VBench finds a clip by its whole prompt, and has prompts of 213 bytes."""


@dataclass(frozen=True)
class Sample:
    """Image or clip to generate."""

    id: str
    record: PromptRecord
    seed: int
    sampling: Sampling
    video: str
    """Path of the mp4 file of a clip, relative to the folder."""
    renamed: bool = False
    """True if VBench cannot find the mp4 file, because its prompt is not a valid file name."""

    @property
    def call(self) -> tuple:
        """Key that is equal for samples that one pipeline call can generate."""
        x = self.sampling
        return x.height, x.width, x.num_frames, x.negative_prompt is None


def plan_samples(
    prompts: Sequence[PromptRecord], sampling: Sampling, *, seed: int, count: int, layout: Layout
) -> list[Sample]:
    """Return `count` samples of each prompt, prompt by prompt.

    Args:
        prompts: prompt records.
        sampling: arguments of the pipeline calls. Sizes and negative prompts of the prompts override them.
        seed: seed of the first sample. Sample i has `seed + i`, unless its prompt has its own seed.
        count: number of samples per prompt.
        layout: "ids" or "vbench", see `generate.generate`.

    Raises:
        ValueError: there are no prompts, two prompts have the same id (or the same text with the layout "vbench"), or a
            seed is out of range.
    """
    if not prompts:
        raise ValueError("prompts=[]: must have at least one prompt")
    check_seed(seed, len(prompts) * count)
    for record in prompts:
        if record.seed is not None:
            check_seed(record.seed, count)
    texts = [x.prompt for x in prompts]
    _check_unique("id", [name_key(x.id) for x in prompts], [x.id for x in prompts], "")
    if layout == "vbench":
        why = " with layout='vbench', which finds clips by their prompt"
        _check_unique("prompt", texts, texts, why)
    samples: list[list[Sample]] = [[] for _ in prompts]
    for j in range(count):
        ending = f"-{j}"
        ids = [x.id for x in prompts]
        if count > 1:
            ids = unique_names(ids, ending=ending)
        videos = ids
        if layout == "vbench":
            # Case matters: VBench has both "a fantasy landscape" and "A fantasy landscape".
            videos = unique_names(
                texts, ending=ending, max_bytes=_VIDEO_NAME_BYTES, fold_case=False
            )
        for i, record in enumerate(prompts):
            vbench = layout == "vbench"
            samples[i].append(
                Sample(
                    id=ids[i],
                    record=record,
                    seed=seed + i * count + j if record.seed is None else record.seed + j,
                    sampling=sampling.overridden(**record.sampling_arguments()),
                    video=f"{VBENCH_FOLDER}/{videos[i]}.mp4" if vbench else f"{videos[i]}.mp4",
                    renamed=vbench and videos[i] != texts[i] + ending,
                )
            )
    return [x for group in samples for x in group]


def plan_batches(samples: Sequence[Sample], batch_size: int) -> list[list[Sample]]:
    """Divide samples into batches of samples that one call can generate, in the order of their first samples."""
    unfinished: dict[tuple, list[Sample]] = {}
    batches: list[list[Sample]] = []
    for sample in samples:
        batch = unfinished.get(sample.call)
        if batch is None or len(batch) == batch_size:
            batch = unfinished[sample.call] = []
            batches.append(batch)
        batch.append(sample)
    return batches


def _check_unique(what: str, keys: list[str], values: list[str], why: str) -> None:
    """Raise ValueError if two keys are equal.

    Args:
        what: field name of the values, for the message.
        keys: keys to compare.
        values: values of the prompts, for the message.
        why: end of the message.
    """
    seen: dict[str, int] = {}
    for i, key in enumerate(keys):
        first = seen.setdefault(key, i)
        if first != i:
            raise ValueError(
                f"prompts[{i}]: {what}={values[i]!r} is also the {what} of prompts[{first}] ({values[first]!r}); "
                f"must be unique{why}"
            )
