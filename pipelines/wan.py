"""Sample one clip with sparse attention: the script to copy.

python pipelines/wan.py                                    # the embedded model, on any machine
python pipelines/wan.py Wan-AI/Wan2.1-T2V-1.3B-Diffusers   # the real one, on a GPU
"""

import sys

import torch
from diffusers.utils import export_to_video

from dit_accel import SparseWanPipeline
from dit_accel.demo import SAMPLING
from dit_accel.files import asset

if len(sys.argv) > 1:
    pipe = SparseWanPipeline.from_pretrained(sys.argv[1], sla="balanced", dtype=torch.bfloat16).to(
        "cuda"
    )
    sampling = {"height": 480, "width": 832, "num_frames": 81}
else:
    pipe = SparseWanPipeline.from_pretrained(asset("tiny-wan"), sla="balanced")
    sampling = SAMPLING

frames = pipe(
    "a red circle moving right", generator=torch.Generator().manual_seed(0), **sampling
).frames[0]
export_to_video(frames, "clip.mp4", fps=16)
print(pipe.summary())
