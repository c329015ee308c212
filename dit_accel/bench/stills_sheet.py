"""Picture of the stills of an embedded image model under their captions (pipelines/stills_sheet.py)."""

import os
import textwrap

import numpy as np
from diffusers import DiffusionPipeline

from dit_accel.demo import default_sampling
from dit_accel.demo.report import clip_batches, judged_clips
from dit_accel.files import model_source
from dit_accel.sampling.media import enlarge, titled, to_uint8, write_png
from dit_accel.sampling.settings import Sampling

COLUMNS, GAP = 8, 4
CAPTIONS = {"train": 16, "heldout": 8}
"""Number of captions of each split."""


def draw_stills(model: str, output: str | os.PathLike) -> None:
    """Sample stills of the first captions that the judge asks for, and write them as PNG.

    Args:
        model: name of an embedded image model.
        output: PNG file to write.
    """
    pipe = DiffusionPipeline.from_pretrained(model_source(model))
    sampling = Sampling(**default_sampling(pipe))
    rows = []
    for split, count in CAPTIONS.items():
        captions = judged_clips(split, count, still=True).captions(with_motion=False)
        batches = clip_batches(pipe, captions, sampling, batch_size=COLUMNS)
        for i, video in zip(range(0, count, COLUMNS), batches, strict=True):
            prompts, stills = captions[i : i + COLUMNS], video[:, :, 0]
            pictures = to_uint8((stills.permute(0, 2, 3, 1).numpy() + 1) / 2)
            pictures = enlarge(pictures, max(192, 2 * pictures.shape[1]))  # room for the captions
            tiles = [
                titled(np.pad(picture, ((0, GAP), (0, GAP), (0, 0))), textwrap.fill(text, 30), 38)
                for picture, text in zip(pictures, prompts, strict=True)
            ]
            rows.append(np.concatenate(tiles, axis=1))
    write_png(output, np.concatenate(rows))
