"""Times sparse prefill of one attention layer against dense attention of torch, in one run.

    python kernels/bench_prefill.py --output kernels/results/prefill_cpu.json
    python kernels/bench_prefill.py --geometry "llama-3.1-8b, a quarter of the heads" --lengths 16384 32768 \\
        --dtypes fp32 --output kernels/results/prefill_llama_cpu.json

Ways take turns; each number is the median of the repeats, in CPU time of one thread. "(0.25)" is the density of the
plan: pairs that it reads over those of a causal call.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tyro

from dit_accel.bench.prefill_speed import PrefillSpeed

if __name__ == "__main__":
    tyro.cli(PrefillSpeed, description=__doc__).run()
