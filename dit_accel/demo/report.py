"""`judge_pipeline`: judge the clips that a pipeline generates, and report the accuracy with intervals."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dit_accel.environment import machine, versions
from dit_accel.files import write_json
from dit_accel.sampling.batches import progress_bar, run_batches
from dit_accel.sampling.plan import plan_batches, plan_samples
from dit_accel.sampling.prompts import number_prompts
from dit_accel.sampling.settings import Sampling, check_seed

from .checks import check_count, check_frame
from .clips import Clips, describe_clips
from .image.stills import StillCombination, describe_stills
from .judge import UNKNOWN, judge_clips
from .shape_judge import ShapeJudge, load_shape_judge
from .vocabulary import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    TEMPLATES,
    Combination,
    combinations,
)

FORMAT_VERSION = 1
METRICS = ("shape", "colour", "motion", "all")
STILL_METRICS = ("shape", "colour", "background", "all")
_WORDS = {"shape": SHAPES, "colour": COLOURS, "motion": MOTIONS, "background": BACKGROUNDS}


def wilson_interval(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    if count == 0:
        return 0.0, 1.0
    rate, spread = right / count, z * z / count
    half = z * math.sqrt(rate * (1 - rate) / count + spread / (4 * count))
    return max(0.0, (rate + spread / 2 - half) / (1 + spread)), min(
        1.0, (rate + spread / 2 + half) / (1 + spread)
    )


def _in_turn(split: str, count: int, generator: torch.Generator) -> list[Combination]:
    allowed = combinations(split)
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(len(allowed), generator=generator).tolist()
    return [allowed[i] for i in order[:count]]


def judged_clips(split: str, count: int, seed: int = 0) -> Clips:
    """What is asked of the model: every combination of the split in turn, in a seeded order,
    captions varied."""
    generator = torch.Generator().manual_seed(seed)
    return describe_clips(_in_turn(split, count, generator), generator)


def judged_stills(split: str, count: int, seed: int = 0) -> Clips:
    """The same for stills. Captions of held-out ones always name the background, without which
    nothing about them would be new."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [StillCombination(*c) for c in _in_turn(split, count, generator)]
    return describe_stills(chosen, generator, naming=split == "heldout")


def score_clips(
    video: Float[Tensor, "n 3 t h w"],
    expected: Clips,
    shape_judge: ShapeJudge | None = None,
    still: bool = False,
) -> list[dict[str, Any]]:
    """One record a clip: what was asked for, what the judge saw, what of it is right.

    `video` has values in [-1, 1]. `all` is shape, colour and motion; for stills, which have no
    motion, shape, colour and background. `background` is None where the caption leaves it open.
    """
    judgement = judge_clips(video, shape_judge)
    names = [name for name in _WORDS if not (still and name == "motion")]
    records = []
    for i in range(len(expected)):
        asked = {name: int(getattr(expected, name)[i]) for name in names}
        seen = {name: int(getattr(judgement, name)[i]) for name in names}
        right: dict[str, bool | None] = {name: asked[name] == seen[name] for name in names}
        if "{background}" not in TEMPLATES[int(expected.template[i])]:
            right["background"] = None
        counted = STILL_METRICS[:-1] if still else METRICS[:-1]
        right["all"] = all(right[name] is not False for name in counted)
        words = {n: "unclear" if k == UNKNOWN else _WORDS[n][k] for n, k in seen.items()}
        records.append(
            {"asked": {n: _WORDS[n][k] for n, k in asked.items()}, "seen": words, "right": right}
        )
    return records


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Right, count, rate and 95 % interval of each metric."""
    summary = {}
    for metric in records[0]["right"]:
        results = [r["right"][metric] for r in records if r["right"][metric] is not None]
        low, high = wilson_interval(sum(results), len(results))
        rate = sum(results) / len(results) if results else None
        summary[metric] = {
            "right": sum(results),
            "count": len(results),
            "rate": None if rate is None else round(rate, 4),
            "interval_95": [round(low, 4), round(high, 4)],
        }
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
        batch_size: clips generated at once.

    Yields:
        Clips with values in [-1, 1].
    """
    samples = plan_samples(number_prompts(prompts), sampling, seed=seed, count=1, layout="ids")
    for made in run_batches(pipe, plan_batches(samples, batch_size)):
        yield torch.from_numpy(made.frames).float().permute(0, 4, 1, 2, 3) * 2 - 1


def check_judged(num_clips: int, num_heldout: int, batch_size: int) -> None:
    """Raise ValueError for numbers of clips that `judge_pipeline` does not accept."""
    check_count("num_clips", num_clips, 0)
    check_count("num_heldout", num_heldout, 0)
    if num_clips + num_heldout == 0:
        raise ValueError("num_clips=0, num_heldout=0: accepted is at least one clip")
    check_count("batch_size", batch_size)


def judge_pipeline(
    pipe: Any,
    *,
    num_clips: int = 288,
    num_heldout: int = 96,
    seed: int = 0,
    batch_size: int = 8,
    num_inference_steps: int = 12,
    guidance_scale: float = 2.0,
    num_frames: int | None = 33,
    height: int = 64,
    width: int = 64,
    max_sequence_length: int = 512,
    shape_judge: ShapeJudge | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Generates clips with any WanPipeline-like object, or stills with an image pipeline, and judges
    them.

    Clip i of a split has the same prompt and the same initial noise (seed + i) whatever the
    pipeline, batch size and steps, so reports of two pipelines can be compared clip by clip.

    Args:
        pipe: called as `WanPipeline` is, or as `StableDiffusion3Pipeline` with `num_frames=None`.
        num_clips: clips of combinations seen in training (173 of them, in turn); may be 0.
        num_heldout: clips of the 19 held-out combinations, in turn; may be 0.
        num_frames: None for stills, whose combinations are of shape, colour and background.
        seed: decides prompts and noise.
        batch_size: clips generated at once.
        num_inference_steps, guidance_scale, height, width, max_sequence_length: for the pipeline.
        shape_judge: defaults to the committed one.
        progress: whether to show a progress bar on stderr.

    Returns:
        A report that `write_report` writes: `settings`, `summary` (for "train", "heldout" and
        "all": right, count, rate and Wilson 95 % interval of shape, colour, motion, the background
        where the caption names it, and `all` as in `score_clips`), `clips` (one record each), `seconds_per_clip`,
        versions and machine.
    """
    check_judged(num_clips, num_heldout, batch_size)
    check_seed(seed, max(num_clips, num_heldout))
    still = num_frames is None
    check_frame(1 if still else num_frames, height, width)
    if not guidance_scale >= 0:
        raise ValueError(f"guidance_scale must be a number >= 0, got {guidance_scale!r}")
    settings: dict[str, Any] = {
        "num_frames": num_frames,
        "height": height,
        "width": width,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "max_sequence_length": max_sequence_length,
    }
    sampling = Sampling(**settings)
    shape_judge = shape_judge or load_shape_judge()
    records: list[dict[str, Any]] = []
    began = time.perf_counter()
    with progress_bar(
        total=num_clips + num_heldout, desc="judging", unit="clip", disable=not progress
    ) as bar:
        for split, count in (("train", num_clips), ("heldout", num_heldout)):
            if count == 0:
                continue
            asked = (judged_stills if still else judged_clips)(split, count, seed)
            prompts = asked.captions(with_motion=not still)
            i = 0
            for video in clip_batches(pipe, prompts, sampling, seed=seed, batch_size=batch_size):
                for record in score_clips(video, asked[i : i + len(video)], shape_judge, still):
                    head = {"index": i, "split": split, "prompt": prompts[i], "seed": seed + i}
                    records.append(head | record)
                    i += 1
                bar.update(len(video))
    seconds = time.perf_counter() - began
    splits = {name: [r for r in records if r["split"] == name] for name in ("train", "heldout")}
    device = getattr(pipe, "device", torch.device("cpu"))
    return {
        "format_version": FORMAT_VERSION,
        "settings": {
            "pipeline": type(pipe).__qualname__,
            "num_clips": num_clips,
            "num_heldout": num_heldout,
            "seed": seed,
            "batch_size": batch_size,
            **settings,
        },
        "summary": {
            name: summarise(rows) for name, rows in (*splits.items(), ("all", records)) if rows
        },
        "seconds_per_clip": round(seconds / len(records), 4),
        "device": str(device),
        "machine": machine(),
        "versions": versions(),
        "clips": records,
    }


def write_report(report: dict[str, Any], path: str | Path, name: str) -> None:
    """Writes a report of `judge_pipeline` as JSON; `name` says which model it is of (a name, not a
    path)."""
    if "/" in name or "\\" in name:
        raise ValueError(f"name must be a plain name without a path, got {name!r}")
    write_json(Path(path), {"format_version": report["format_version"], "model": name, **report})
