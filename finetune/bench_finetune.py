"""Quality of the embedded model after each way of fine-tuning, in one run:

    python finetune/bench_finetune.py --data latents --topk 0.1 --output finetune/results/tiny_wan_90.json

Plain top-k and shared_softmax without training, the regression alone, distillation of all weights, of LoRA, with a
learned router, and the diffusion loss at equal cost; then longer runs of the recipe (`--longer-steps` without numbers:
none). Stopped, it goes on where it was; finished, it prints its table again. `make bench-finetune` does 90 and 95 %.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tyro

from dit_accel.bench.finetune_quality import FinetuneQuality

if __name__ == "__main__":
    tyro.cli(FinetuneQuality, description=__doc__).run()
