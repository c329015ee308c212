"""One image of Lumina-Image 2.0 with region-adaptive sampling: the script to copy.

python pipelines/lumina2.py Alpha-VLLM/Lumina-Image-2.0
"""

import sys

import torch

from dit_accel import SparseLumina2Pipeline

if len(sys.argv) != 2:
    sys.exit(__doc__)
pipe = SparseLumina2Pipeline.from_pretrained(sys.argv[1], ras="balanced", dtype=torch.bfloat16)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
image = pipe(
    "a red circle on a teal background",
    height=1024,
    width=1024,
    num_inference_steps=50,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("image.png")
print(pipe.summary())
