"""Quality of the embedded model after each way of fine-tuning, in one run:

    python finetune/bench_finetune.py --data latents --output finetune/results/tiny_wan.json

At 90 and 95 % sparsity: plain top-k and shared_softmax without training, the regression alone, distillation of all
weights, of LoRA, with a learned router, and the diffusion loss at equal cost; then longer runs of the recipe
(`--longer-steps` without numbers: none). Stopped, it goes on where it was; finished, it prints its table again.
`make bench-finetune` makes the data too.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tyro

from dit_accel.bench.finetune_quality import FinetuneQuality

if __name__ == "__main__":
    tyro.cli(FinetuneQuality, description=__doc__).run()
