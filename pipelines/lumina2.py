"""Sample one image with region-adaptive sampling: the script to copy.

python pipelines/lumina2.py                                # the embedded model, on any machine
python pipelines/lumina2.py Alpha-VLLM/Lumina-Image-2.0    # the real one, on a GPU
"""

import sys

import torch

from dit_accel import SparseLumina2Pipeline
from dit_accel.demo import default_sampling

if len(sys.argv) > 1:
    pipe = SparseLumina2Pipeline.from_pretrained(sys.argv[1], ras="balanced", dtype=torch.bfloat16)
    pipe.to("cuda")
    sampling = {"height": 1024, "width": 1024, "num_inference_steps": 50}
else:
    pipe = SparseLumina2Pipeline.from_pretrained("tiny-lumina2", ras="balanced")
    sampling = default_sampling(pipe)

prompt = "a red circle on a teal background"
image = pipe(prompt, generator=torch.Generator().manual_seed(0), **sampling).images[0]
image.save("image.png")
print(pipe.summary())
