"""Count the bytes and collectives of each step of a sampling loop under context parallelism. CPUs are enough.

    torchrun --nproc-per-node 2 pipelines/bench_parallel.py --output pipelines/results/parallel_traffic.json

The rows are dense attention with diffusers' Ulysses, dense steps, sparse attention, and partial and forecast steps of
region-adaptive sampling, on a Wan2.1-1.3B with few layers and random weights. Bytes and collectives are exact and do
not depend on the machine. No time is measured.
"""

import tyro

from dit_accel.bench.parallel_traffic import ParallelTraffic

if __name__ == "__main__":
    tyro.cli(ParallelTraffic, description=__doc__).run()
