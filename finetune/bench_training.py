"""Measure time and memory of a training step with sparse attention, against dense training, all rows in one run.

    python finetune/bench_training.py --output finetune/results/training_cpu.json
    python finetune/bench_training.py --device cuda --output finetune/results/training_gpu.json

On a CPU: forward and backward pass of a one-layer Wan transformer with the width of Wan2.1 1.3B, of its block and of the
block's self-attention, on 8,192 tokens in fp32. On a GPU: the whole Wan2.1 1.3B on 81 frames at 480p, in bf16 with
fp32 weights and gradient checkpointing. Weights are random. A CPU run takes half an hour on two cores, and a third of it
with `--heads 4 --ffn-dim 2986`.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tyro

from dit_accel.bench.training_step import TrainingStep

if __name__ == "__main__":
    tyro.cli(TrainingStep, description=__doc__).run()
