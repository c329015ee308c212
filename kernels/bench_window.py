"""Time attention with a sliding window on one layer: a mask of all pairs, chunks of dense attention, a block-sparse plan.

    python kernels/bench_window.py --output kernels/results/window_cpu.json

Each number is the median of the repeats, on one thread. "causal" is dense attention without a window.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tyro

from dit_accel.bench.window_speed import WindowSpeed

if __name__ == "__main__":
    tyro.cli(WindowSpeed, description=__doc__).run()
