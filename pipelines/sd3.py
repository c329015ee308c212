"""Sample one image with region-adaptive sampling: the script to copy.

python pipelines/sd3.py                                                     # the embedded model, on any machine
python pipelines/sd3.py stabilityai/stable-diffusion-3-medium-diffusers     # the real one, on a GPU
"""

import sys

import torch

from dit_accel import SparseStableDiffusion3Pipeline
from dit_accel.demo import IMAGE_SAMPLING
from dit_accel.files import asset

if len(sys.argv) > 1:
    pipe = SparseStableDiffusion3Pipeline.from_pretrained(
        sys.argv[1], ras="balanced", dtype=torch.float16
    ).to("cuda")
    sampling = {"height": 1024, "width": 1024, "num_inference_steps": 28}
else:
    pipe = SparseStableDiffusion3Pipeline.from_pretrained(asset("tiny-sd3"), ras="balanced")
    sampling = IMAGE_SAMPLING

prompt = "a red circle on a teal background"
image = pipe(prompt, generator=torch.Generator().manual_seed(0), **sampling).images[0]
image.save("image.png")
print(pipe.summary())
