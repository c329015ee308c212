"""Measure time and quality of region-adaptive sampling, all rows in one run.

    python pipelines/bench_ras.py overhead --output pipelines/results/ras_overhead_cpu.json
    python pipelines/bench_ras.py overhead --device cuda --output pipelines/results/ras_overhead_gpu.json
    python pipelines/bench_ras.py quality --model tiny-wan --output pipelines/results/ras_tiny_wan.json
    python pipelines/bench_ras.py learned --model tiny-sd3 --output pipelines/results/ras_learned_tiny_sd3.json
    python pipelines/bench_ras.py tables pipelines/results/ras_tiny_*.json

overhead: speed-up of partial steps over dense steps, and of runs with forecast steps over dense runs, against the ratios
of counted FLOPs.
quality: samples with paired seeds that were not used for tuning, against two references from the same noise: the dense run
with the same number of steps, and one with 100 steps. Fewer steps and the step caches of diffusers have the same cost;
their thresholds are searched on other samples. A stopped run resumes.
learned: a forecast schedule learned on eight samples, against the computed schedule on other samples.
"""

import os
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tyro

from dit_accel.bench.ras_learned import Learned
from dit_accel.bench.ras_overhead import Overhead
from dit_accel.bench.ras_quality import Quality, Tables

Command = (
    Annotated[Overhead, tyro.conf.subcommand("overhead")]
    | Annotated[Learned, tyro.conf.subcommand("learned")]
    | Annotated[Quality, tyro.conf.subcommand("quality")]
    | Annotated[Tables, tyro.conf.subcommand("tables")]
)

if __name__ == "__main__":
    tyro.cli(Command, description=__doc__, config=(tyro.conf.OmitSubcommandPrefixes,)).run()
