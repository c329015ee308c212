"""`plan_samples` and `plan_batches`: the samples of a run, their names and seeds, and who shares a call."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dit_accel.sampling.names import name_key, unique_names
from dit_accel.sampling.prompts import PromptRecord
from dit_accel.sampling.settings import Sampling, check_seed

Layout = Literal["ids", "vbench"]
VBENCH_SAMPLES = 5
"""Clips a prompt that the suite asks for; 25 for its dimension temporal_flickering."""
VBENCH_FOLDER = "vbench"
"""Holds nothing but mp4 files: VBench takes the suffix of its videos from the first file that it sees."""
_VIDEO_NAME_BYTES = 250
"""VBench has prompts of 213 bytes, and finds a clip by the whole of them."""


@dataclass(frozen=True)
class Sample:
    """One image or clip to make."""

    id: str
    record: PromptRecord
    seed: int
    sampling: Sampling
    video: str
    """Where the mp4 of a clip goes, relative to the folder."""
    renamed: bool = False
    """Whether VBench would look for the mp4 under another name, which no file can have."""

    @property
    def call(self) -> tuple:
        """Equal for samples that one pipeline call can make."""
        x = self.sampling
        return x.height, x.width, x.num_frames, x.negative_prompt is None


def plan_samples(
    prompts: Sequence[PromptRecord], sampling: Sampling, *, seed: int, count: int, layout: Layout
) -> list[Sample]:
    """Plan `count` samples of each prompt, prompt by prompt; sample i has `seed + i`, or its prompt's own seed.

    Raises:
        ValueError: no prompts, or two of them with one id (with layout "vbench": or one text); a seed out of
            range.
    """
    if not prompts:
        raise ValueError("prompts=[]: accepted is at least one")
    check_seed(seed, len(prompts) * count)
    for record in prompts:
        if record.seed is not None:
            check_seed(record.seed, count)
    texts = [x.prompt for x in prompts]
    _check_unique("id", [name_key(x.id) for x in prompts], [x.id for x in prompts], "")
    if layout == "vbench":
        why = " with layout='vbench', where a clip is found by its prompt"
        _check_unique("prompt", texts, texts, why)
    samples: list[list[Sample]] = [[] for _ in prompts]
    for j in range(count):
        ending = f"-{j}"
        ids = [x.id for x in prompts]
        if count > 1:
            ids = unique_names(ids, ending=ending)
        videos = ids
        if layout == "vbench":
            # Not by case: the suite has both "a fantasy landscape" and "A fantasy landscape".
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
    """Return batches in the order of their first samples; only samples that one call can make share one."""
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
    seen: dict[str, int] = {}
    for i, key in enumerate(keys):
        first = seen.setdefault(key, i)
        if first != i:
            raise ValueError(
                f"prompts[{i}]: has the {what} {values[i]!r}, and prompts[{first}] has {values[first]!r}; "
                f"accepted is one each{why}"
            )
