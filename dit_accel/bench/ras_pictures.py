"""Picture of region-adaptive sampling in docs/ras.md (pipelines/ras_pictures.py)."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8

from dit_accel import RASConfig, SparseStableDiffusion3Pipeline, SparseWanPipeline
from dit_accel.demo import IMAGE_SAMPLING, SAMPLING
from dit_accel.files import asset
from dit_accel.sampling.focus import focus_masks, heat
from dit_accel.sampling.media import contact_sheet, to_uint8, write_png

COLUMNS, STEPS, RATIO, GAIN = 8, 50, 0.25, 8
IMAGES = (
    "a red circle on a teal background",
    "a blue square on a gray background",
    "a yellow triangle on a navy background",
    "a white cross on a brown background",
    "an orange circle on a black background",
    "a cyan square on a maroon background",
    "a green triangle on a gray background",
    "a purple circle on a brown background",
)
CLIP = "a red circle circling clockwise on a teal background"

Row = tuple[str, UInt8[np.ndarray, "t h w 3"]]
"""Title and pictures of one row of the sheet."""


def evenly(frames: np.ndarray, count: int = COLUMNS) -> np.ndarray:
    """Return `count` evenly spaced frames; with fewer frames, some of them repeat."""
    return frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]


def sampled(
    pipe: Any, prompts: Sequence[str], sampling: dict[str, Any]
) -> Float[np.ndarray, "t h w 3"]:
    """Return one image of each prompt, or evenly spaced frames of the only clip."""
    generator = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    out = pipe(list(prompts), generator=generator, output_type="np", **sampling)
    return evenly(out.images if hasattr(out, "images") else out.frames[0])


def step_shares(pipe: Any, samples: int) -> Row:
    """Return the share of the steps in which each token ran."""
    shares = np.stack(
        [np.mean(list(focus_masks(pipe, i).values()), axis=0) for i in range(samples)]
    )
    shares = (shares - shares.min()) / max(np.ptp(shares), 1e-6)
    return "where it ran, blue least, yellow most often", evenly(
        heat(shares.reshape(-1, *shares.shape[2:]))
    )


def first_steps(pipe: Any, samples: int) -> Row:
    """Return the tokens that ran in the first partial steps, which are the same for all samples."""
    masks = dict(list(focus_masks(pipe).items())[:COLUMNS])
    ran = np.stack([mask[len(mask) // 2] for mask in masks.values()])
    where = ", middle frame" if len(masks[min(masks)]) > 1 else ""
    title = f"who ran (yellow) in steps {min(masks)} to {max(masks)}{where}"
    return title, heat(ran.astype(float))


VARIANTS: tuple[tuple[str, dict[str, Any], Callable[[Any, int], Row]], ...] = (
    ("ours", {}, first_steps),
    ("preset paper", RASConfig.PRESETS["paper"], step_shares),
)
"""Name, settings apart from the ratio, and picture of the tokens that ran."""


def ras_rows(pipe: Any, prompts: Sequence[str], sampling: dict[str, Any], title: str) -> list[Row]:
    """Return rows for dense sampling and for each variant: samples, tokens that ran, difference to dense."""
    sampling = {**sampling, "num_inference_steps": STEPS, "max_sequence_length": 16}
    dense = sampled(pipe, prompts, sampling)
    rows: list[Row] = [(f"{title}, dense, {STEPS} steps", to_uint8(dense))]
    for name, ras, tokens_that_ran in VARIANTS:
        pipe.enable(ras={**ras, "ratio": RATIO})
        result = sampled(pipe, prompts, sampling)
        cost = pipe.summary(strict=True).ras.cost
        caption, ran = tokens_that_ran(pipe, len(prompts))
        pipe.disable()
        by = dense.shape[1] // ran.shape[1]
        rows += [
            (f"{name}, ratio {RATIO}, cost of {cost:.1f} steps", to_uint8(result)),
            (f"{name}: {caption}", ran.repeat(by, 1).repeat(by, 2)),
            (f"{name}: difference to dense, {GAIN} times", to_uint8(GAIN * np.abs(result - dense))),
        ]
    return rows


def draw_ras(output: str | os.PathLike) -> None:
    """Sample eight images and a clip with the embedded models, and write the sheet as PNG."""
    images = SparseStableDiffusion3Pipeline.from_pretrained(asset("tiny-sd3"), sla=None)
    clips = SparseWanPipeline.from_pretrained(asset("tiny-wan"), sla=None)
    rows = ras_rows(images, IMAGES, IMAGE_SAMPLING, "tiny-sd3")
    rows += ras_rows(clips, [CLIP], SAMPLING, "tiny-wan, frames of one clip")
    write_png(output, contact_sheet(rows, columns=COLUMNS, tile=128))
