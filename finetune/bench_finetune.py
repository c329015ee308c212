"""Compare the quality of the embedded model after each way of fine-tuning.

    python finetune/bench_finetune.py --data latents --output finetune/results/tiny_wan.json

At 90 and 95 % sparsity, the benchmark compares top-k and shared_softmax without training, the regression stage alone,
distillation of all weights, of LoRA and with a learned router, and the diffusion loss at equal cost. Then it runs the
recipe with more steps (`--longer-steps` without numbers skips this). An interrupted benchmark continues when it is
started again. A finished benchmark prints its table again. `make bench-finetune` also makes the data.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tyro

from dit_accel.bench.finetune_quality import FinetuneQuality

if __name__ == "__main__":
    tyro.cli(FinetuneQuality, description=__doc__).run()
