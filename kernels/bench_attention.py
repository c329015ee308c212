"""Time sparse attention against every dense attention of torch on the same inputs, in one run.

    python kernels/bench_attention.py --output kernels/results/cpu.json
    python kernels/bench_attention.py --device cuda --dtype bf16 --output kernels/results/gpu.json
    python kernels/bench_attention.py --parts crossover    # rewrites dit_accel/sla/crossover.json

Functions run in turns; a result is the median of the repeats. Each mode is timed as a whole call (routing, planning,
attention, linear branch, projection) and with its plan ready. "% of ideal" is the speed-up times the density: 100 % means
that the time shrank as much as the work. On a CPU it is the CPU time of one thread. The crossover uses wall-clock time
with all threads of torch.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tyro

from dit_accel.bench.attention_speed import AttentionSpeed

if __name__ == "__main__":
    tyro.cli(AttentionSpeed, description=__doc__).run()
