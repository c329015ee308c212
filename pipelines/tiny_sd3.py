"""24 stills of the embedded image model under their captions, the first 16 and the first 8 (held out)
that the judge asks for: assets/tiny-sd3.png.

python pipelines/tiny_sd3.py sheet.png
"""

import sys
import textwrap

import numpy as np
from diffusers import StableDiffusion3Pipeline

from dit_accel.demo import IMAGE_SAMPLING
from dit_accel.demo.report import clip_batches, judged_stills
from dit_accel.files import asset
from dit_accel.sampling.media import enlarge, titled, to_uint8, write_png
from dit_accel.sampling.settings import Sampling

COLUMNS, GAP = 8, 4

pipe = StableDiffusion3Pipeline.from_pretrained(asset("tiny-sd3"))
rows = []
for split, count in (("train", 16), ("heldout", 8)):
    captions = judged_stills(split, count).captions(with_motion=False)
    batches = clip_batches(pipe, captions, Sampling(**IMAGE_SAMPLING), batch_size=COLUMNS)
    for i, video in zip(range(0, count, COLUMNS), batches, strict=True):
        prompts, stills = captions[i : i + COLUMNS], video[:, :, 0]
        pictures = enlarge(to_uint8((stills.permute(0, 2, 3, 1).numpy() + 1) / 2), 192)
        tiles = [
            titled(np.pad(picture, ((0, GAP), (0, GAP), (0, 0))), textwrap.fill(text, 30), 38)
            for picture, text in zip(pictures, prompts, strict=True)
        ]
        rows.append(np.concatenate(tiles, axis=1))
write_png(sys.argv[1], np.concatenate(rows))
