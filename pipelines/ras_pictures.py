"""The embedded models dense and with region-adaptive sampling, where its steps worked, and what differs:

python pipelines/ras_pictures.py assets/ras.png
"""

import sys
from typing import Any

import numpy as np
import torch

from dit_accel import RASConfig, SparseStableDiffusion3Pipeline, SparseWanPipeline
from dit_accel.demo import IMAGE_SAMPLING, SAMPLING
from dit_accel.files import asset
from dit_accel.sampling.focus import focus_masks, heat
from dit_accel.sampling.media import contact_sheet, to_uint8, write_png

COLUMNS, STEPS, RATIO, GAIN = 8, 50, 0.25, 8
IMAGES = [
    "a red circle on a teal background",
    "a blue square on a gray background",
    "a yellow triangle on a navy background",
    "a white cross on a brown background",
    "an orange circle on a black background",
    "a cyan square on a maroon background",
    "a green triangle on a gray background",
    "a purple circle on a brown background",
]
CLIP = "a red circle circling clockwise on a teal background"


def pictures(pipe: Any, prompts: list[str], sampling: dict[str, Any]) -> np.ndarray:
    """Return one image of each prompt, or evenly spaced frames of the only clip, `[COLUMNS, H, W, 3]`."""
    generator = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    out = pipe(prompts, generator=generator, output_type="np", **sampling)
    return evenly(out.images if hasattr(out, "images") else out.frames[0])


def evenly(frames: np.ndarray) -> np.ndarray:
    return frames[np.linspace(0, len(frames) - 1, COLUMNS).round().astype(int)]


def share(pipe: Any, samples: int) -> tuple[str, np.ndarray]:
    """Return the share of the steps in which each token ran, `[COLUMNS, H, W, 3]`."""
    shares = np.stack(
        [np.mean(list(focus_masks(pipe, i).values()), axis=0) for i in range(samples)]
    )
    shares = (shares - shares.min()) / max(np.ptp(shares), 1e-6)
    return "where it ran, blue least, yellow most often", evenly(
        heat(shares.reshape(-1, *shares.shape[2:]))
    )


def turns(pipe: Any, samples: int) -> tuple[str, np.ndarray]:
    """Return the tokens that ran in the first steps, the same for all samples, `[COLUMNS, H, W, 3]`."""
    masks = dict(list(focus_masks(pipe).items())[:COLUMNS])
    who = np.stack([mask[len(mask) // 2] for mask in masks.values()])
    where = ", middle frame" if len(masks[min(masks)]) > 1 else ""
    return f"who ran (yellow) in steps {min(masks)} to {max(masks)}{where}", heat(who.astype(float))


def rows_of(pipe: Any, prompts: list[str], sampling: dict[str, Any], what: str) -> list[tuple]:
    sampling = {**sampling, "num_inference_steps": STEPS, "max_sequence_length": 16}
    dense = pictures(pipe, prompts, sampling)
    rows = [(f"{what}, dense, {STEPS} steps", to_uint8(dense))]
    for name, ras, look in (
        ("ours", {}, turns),
        ("preset paper", RASConfig.PRESETS["paper"], share),
    ):
        pipe.enable(ras={**ras, "ratio": RATIO})
        result = pictures(pipe, prompts, sampling)
        cost, (title, ran) = pipe.summary(strict=True).ras.cost, look(pipe, len(prompts))
        pipe.disable()
        by = dense.shape[1] // ran.shape[1]
        rows += [
            (f"{name}, ratio {RATIO}, cost of {cost:.1f} steps", to_uint8(result)),
            (
                f"{name}: {title}",
                ran.repeat(by, 1).repeat(by, 2),
            ),
            (f"{name}: difference to dense, {GAIN} times", to_uint8(GAIN * np.abs(result - dense))),
        ]
    return rows


images = SparseStableDiffusion3Pipeline.from_pretrained(asset("tiny-sd3"), sla=None)
clips = SparseWanPipeline.from_pretrained(asset("tiny-wan"), sla=None)
rows = rows_of(images, IMAGES, IMAGE_SAMPLING, "tiny-sd3")
rows += rows_of(clips, [CLIP], SAMPLING, "tiny-wan, frames of one clip")
write_png(sys.argv[1], contact_sheet(rows, columns=COLUMNS, tile=128))
