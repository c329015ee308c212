"""Sample one image of Lumina-Next with region-adaptive sampling: the script to copy.

python pipelines/lumina.py Alpha-VLLM/Lumina-Next-SFT-diffusers
"""

import sys

import torch

from dit_accel import SparseLuminaPipeline

if len(sys.argv) != 2:
    sys.exit(__doc__)
pipe = SparseLuminaPipeline.from_pretrained(sys.argv[1], ras="balanced", dtype=torch.bfloat16)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
image = pipe(
    "a red circle on a teal background",
    height=1024,
    width=1024,
    num_inference_steps=30,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("image.png")
print(pipe.summary())
