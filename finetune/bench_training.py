"""Measure time and memory of a training step with sparse attention, compared with dense attention.

    python finetune/bench_training.py --output finetune/results/training_cpu.json
    python finetune/bench_training.py --device cuda --output finetune/results/training_gpu.json

On a CPU, the benchmark runs forward and backward of a one-layer Wan transformer as wide as Wan2.1 1.3B, of its block,
and of the self-attention of the block, on 8,192 tokens in fp32. On a GPU, it runs the complete Wan2.1 1.3B on 81 frames
at 480p, in bf16 with fp32 weights and gradient checkpointing. Weights are random. The CPU benchmark takes half an hour
on two cores; `--heads 4 --ffn-dim 2986` reduces it to a third.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tyro

from dit_accel.bench.training_step import TrainingStep

if __name__ == "__main__":
    tyro.cli(TrainingStep, description=__doc__).run()
