"""Judgement of the samples that a pipeline generates: accuracy of each label, with intervals."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dit_accel.environment import machine, versions
from dit_accel.sampling.batches import progress_bar, run_batches
from dit_accel.sampling.plan import plan_batches, plan_samples
from dit_accel.sampling.prompts import number_prompts
from dit_accel.sampling.settings import Sampling, check_count, check_seed

from .clips import CENTRAL, STILL, Clips, describe_clips
from .dataset import check_frame
from .judge import UNKNOWN, ShapeJudge, judge_clips, load_shape_judge
from .vocabulary import LABELS, TEMPLATES, combinations


def judged_clips(split: str, count: int, seed: int = 0, still: bool = False) -> Clips:
    """Return the clips or stills that a model is asked for: each combination of the split in turn.

    Captions of held-out stills always name the background, because only the background makes them new.
    """
    generator, allowed = torch.Generator().manual_seed(seed), combinations(split)
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(len(allowed), generator=generator).tolist()
    chosen = [allowed[i] for i in order[:count]]
    naming = still and split == "heldout"
    return describe_clips(chosen, generator, STILL if still else CENTRAL, naming)


def score_clips(
    video: Float[Tensor, "n 3 t h w"],
    expected: Clips,
    shape_judge: ShapeJudge | None = None,
    still: bool = False,
) -> list[dict[str, Any]]:
    """Return a record per clip with the dicts `asked`, `seen` and `right`, by label.

    Args:
        video: clips with values in [-1, 1].
        expected: descriptions that the clips were generated from.
        shape_judge: Default: the trained CNN that comes with the package.
        still: judge the background instead of the motion.

    `right["background"]` is None where the caption leaves the background open. `right["all"]` covers shape, colour
    and motion of a clip, or shape, colour and background of a still.
    """
    judgement = judge_clips(video, shape_judge)
    names = [name for name in LABELS if not (still and name == "motion")]
    records = []
    for i in range(len(expected)):
        asked, seen = (
            {name: int(getattr(labels, name)[i]) for name in names}
            for labels in (expected, judgement)
        )
        right: dict[str, bool | None] = {name: asked[name] == seen[name] for name in names}
        if "{background}" not in TEMPLATES[int(expected.template[i])]:
            right["background"] = None
        right["all"] = all(right[name] is not False for name in names[:3])
        words = {n: "unclear" if k == UNKNOWN else LABELS[n][k] for n, k in seen.items()}
        named = {n: LABELS[n][k] for n, k in asked.items()}
        records.append({"asked": named, "seen": words, "right": right})
    return records


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return count of right answers, count, rate and 95 % interval of each label."""
    from scipy.stats import binomtest

    summary = {}
    for name in records[0]["right"]:
        results = [x["right"][name] for x in records if x["right"][name] is not None]
        right, count = sum(results), len(results)
        rate = round(right / count, 4) if count else None
        bounds = binomtest(right, count).proportion_ci(method="wilson") if count else (0.0, 1.0)
        interval = [round(float(x), 4) for x in bounds]
        summary[name] = {"right": right, "count": count, "rate": rate, "interval_95": interval}
    return summary


def clip_batches(
    pipe: Any, prompts: Sequence[str], sampling: Sampling, *, seed: int = 0, batch_size: int = 8
) -> Iterator[Float[Tensor, "n 3 t h w"]]:
    """Generate batches of clips, or of stills (one frame each) with an image pipeline.

    Args:
        pipe: called as `WanPipeline` or `StableDiffusion3Pipeline` is.
        prompts: prompt i has the initial noise of `seed + i`, whatever the batch size.
        sampling: arguments of the pipeline call.
        seed: first seed.
        batch_size: clips per call.

    Yields:
        Clips with values in [-1, 1].
    """
    samples = plan_samples(number_prompts(prompts), sampling, seed=seed, count=1, layout="ids")
    for made in run_batches(pipe, plan_batches(samples, batch_size)):
        yield torch.from_numpy(made.frames).float().permute(0, 4, 1, 2, 3) * 2 - 1


def check_judged(num_clips: int, num_heldout: int, batch_size: int) -> None:
    """Raise ValueError for numbers of clips that `judge_pipeline` does not accept."""
    check_count("num_clips", num_clips, least=0)
    check_count("num_heldout", num_heldout, least=0)
    if num_clips + num_heldout == 0:
        raise ValueError("num_clips=0, num_heldout=0: at least one must be positive")
    check_count("batch_size", batch_size)


def judge_pipeline(
    pipe: Any,
    sampling: Sampling,
    *,
    num_clips: int = 288,
    num_heldout: int = 96,
    seed: int = 0,
    batch_size: int = 8,
    shape_judge: ShapeJudge | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Generate clips or stills with a pipeline, and judge them.

    Clip i of a split has the same prompt and the same initial noise (`seed + i`) for every pipeline, batch size
    and number of steps, so reports of two pipelines can be compared clip by clip.

    Args:
        pipe: called as `WanPipeline` is, or as `StableDiffusion3Pipeline` for stills.
        sampling: arguments of the pipeline call, such as `Sampling(**default_sampling(pipe))`. Without
            `num_frames` the pipeline makes stills, whose labels are shape, colour and background.
        num_clips: clips of the combinations seen in training, in turn; may be 0.
        num_heldout: clips of the held-out combinations, in turn; may be 0.
        seed: decides prompts and noise.
        batch_size: clips per call.
        shape_judge: Default: the trained CNN that comes with the package.
        progress: show a progress bar on stderr.

    Returns:
        A report for JSON: `settings`, `summary` (for "train", "heldout" and "all": see `summarise`),
        `clips` (one record each, see `score_clips`), `seconds_per_clip`, device, machine and versions.
    """
    check_judged(num_clips, num_heldout, batch_size)
    check_seed(seed, max(num_clips, num_heldout))
    still = sampling.num_frames is None
    check_frame(sampling.num_frames or 1, sampling.height or 0, sampling.width or 0)
    if (sampling.guidance_scale or 0) < 0:
        raise ValueError(f"guidance_scale={sampling.guidance_scale!r}: must be >= 0")
    shape_judge = shape_judge or load_shape_judge()
    splits = {"train": num_clips, "heldout": num_heldout}
    records: dict[str, list[dict[str, Any]]] = {}
    began = time.perf_counter()
    total = num_clips + num_heldout
    with progress_bar(total=total, desc="judging", unit="clip", disable=not progress) as bar:
        for split in (name for name, count in splits.items() if count):
            asked = judged_clips(split, splits[split], seed, still)
            prompts = asked.captions(with_motion=not still)
            rows = records[split] = []
            for video in clip_batches(pipe, prompts, sampling, seed=seed, batch_size=batch_size):
                batch = asked[len(rows) : len(rows) + len(video)]
                for record in score_clips(video, batch, shape_judge, still):
                    i = len(rows)
                    head = {"index": i, "split": split, "prompt": prompts[i], "seed": seed + i}
                    rows.append(head | record)
                bar.update(len(video))
    seconds = time.perf_counter() - began
    clips = [record for rows in records.values() for record in rows]
    counts = {"num_clips": num_clips, "num_heldout": num_heldout, "seed": seed}
    unused = ("negative_prompt", "image")
    call = {name: value for name, value in asdict(sampling).items() if name not in unused}
    return {
        "format_version": 1,
        "settings": {
            "pipeline": type(pipe).__qualname__,
            **counts,
            "batch_size": batch_size,
            **call,
        },
        "summary": {name: summarise(rows) for name, rows in (records | {"all": clips}).items()},
        "seconds_per_clip": round(seconds / total, 4),
        "device": str(getattr(pipe, "device", "cpu")),
        "machine": machine(),
        "versions": versions(),
        "clips": clips,
    }
