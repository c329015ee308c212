"""What region-adaptive sampling costs in time and quality, all rows in one run.

    python pipelines/bench_ras.py overhead --output pipelines/results/ras_overhead_cpu.json
    python pipelines/bench_ras.py overhead --device cuda --output pipelines/results/ras_overhead_gpu.json
    python pipelines/bench_ras.py quality --model tiny-wan --output pipelines/results/ras_tiny_wan.json
    python pipelines/bench_ras.py learned --model tiny-sd3 --output pipelines/results/ras_learned_tiny_sd3.json
    python pipelines/bench_ras.py tables pipelines/results/ras_tiny_*.json

Overhead: seconds of a partial step against a dense one, and of a run with forecast steps against a dense run, over the
ratio of the FLOPs that they count. Quality: paired seeds that no choice was made on, against two references from the
same noise: the plain run of as many steps, and one of 100 steps. Fewer steps and the step caches of diffusers cost what
ours costs; thresholds are searched for that, on other samples. A run that was stopped goes on where it was. Learned: a
schedule that is moved step by step on eight samples, beside the computed one on others.
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
