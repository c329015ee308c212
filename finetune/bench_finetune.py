"""Measure the quality of the embedded model after each kind of fine-tuning, in one run.

    python finetune/bench_finetune.py --data latents --output finetune/results/tiny_wan.json

Rows at 90 and 95 % sparsity: top-k and shared_softmax without training; regression alone; distillation of all weights, of
LoRA, and with a learned router; and the diffusion loss at equal cost. Then longer runs of the recipe (`--longer-steps`
without numbers: none). A stopped run resumes; a finished run prints its table again. `make bench-finetune` also makes the
data.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tyro

from dit_accel.bench.finetune_quality import FinetuneQuality

if __name__ == "__main__":
    tyro.cli(FinetuneQuality, description=__doc__).run()
