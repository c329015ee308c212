"""The embedded models dense and with region-adaptive sampling, and where its steps worked: assets/ras.png.

python pipelines/ras_pictures.py assets/ras.png
"""

import sys

import numpy as np
import torch

from dit_accel import SparseStableDiffusion3Pipeline, SparseWanPipeline
from dit_accel.demo import IMAGE_SAMPLING, SAMPLING
from dit_accel.files import asset
from dit_accel.media import contact_sheet, to_uint8, write_png
from dit_accel.pipelines.focus import focus_masks, heat

COLUMNS, STEPS = 8, 50
PROMPTS = [
    "a red circle on a teal background",
    "a blue square on a gray background",
    "a yellow triangle on a navy background",
    "a white cross on a brown background",
    "an orange circle on a black background",
    "a cyan square on a maroon background",
    "a green triangle on a gray background",
    "a purple circle on a brown background",
]


def ran(pipe, sample: int = 0) -> np.ndarray:
    """How often each token ran, as colours: blue for the least, yellow for the most."""
    share = np.mean(list(focus_masks(pipe, sample).values()), axis=0)
    return heat((share - share.min()) / max(np.ptp(share), 1e-6))


def rows_of(title: str, pictures: np.ndarray, cost: float) -> tuple[str, np.ndarray]:
    return f"{title}, cost of {cost:.1f} dense steps", to_uint8(pictures)


rows = []
images = SparseStableDiffusion3Pipeline.from_pretrained(asset("tiny-sd3"))
clips = SparseWanPipeline.from_pretrained(asset("tiny-wan"), sla=None)
for ras, title in (
    (None, "dense"),
    ({"ratio": 0.25}, "RAS, ratio .25"),
    ({"ratio": 0.25, "selection": "std"}, "RAS, ratio .25, lowest deviation"),
):
    for pipe in (images, clips):
        if ras is not None:
            pipe.enable(ras=ras)
        still = pipe is images
        sampling = {**(IMAGE_SAMPLING if still else SAMPLING), "num_inference_steps": STEPS}
        sampling["max_sequence_length"] = 16
        prompts = PROMPTS if still else ["a red circle circling clockwise on a teal background"]
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        out = pipe(prompts, generator=generators, output_type="np", **sampling)
        frames = out.images if still else out.frames[0]
        cost = STEPS if ras is None else pipe.summary(strict=True).ras.cost
        rows.append(rows_of(title, frames, cost))
        if ras is not None:
            if still:
                maps = np.concatenate([ran(pipe, i) for i in range(len(prompts))])
            else:
                cells = ran(pipe)
                maps = cells[np.linspace(0, len(cells) - 1, COLUMNS).round().astype(int)]
            rows.append(
                (
                    "where it ran: blue least, yellow most often",
                    maps.repeat(4 if still else 8, 1).repeat(4 if still else 8, 2),
                )
            )
        pipe.disable()
write_png(sys.argv[1], contact_sheet(rows, columns=COLUMNS, tile=96))
