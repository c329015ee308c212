"""Measure quality and speed of sparse attention, all rows in one run.

    python pipelines/bench_sla.py quality --model tiny-wan --output pipelines/results/sla_tiny_wan.json
    python pipelines/bench_sla.py together --model tiny-wan --output pipelines/results/sla_ras_tiny_wan.json
    python pipelines/bench_sla.py speed --output pipelines/results/sla_speed_cpu.json
    python pipelines/bench_sla.py speed --device cuda --output pipelines/results/sla_speed_gpu.json

quality: training-free; the same prompts and seeds dense and sparse, with a random plan of the same density as control, and
errors of single attention outputs for many more settings.
together: sparse attention and region-adaptive sampling, alone and together.
speed: seconds of one transformer call, dense, sparse, region-adaptive and both, against the ratios of counted FLOPs.
"""

import os
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tyro

from dit_accel.bench.sla_quality import Quality
from dit_accel.bench.sla_speed import Speed
from dit_accel.bench.sla_together import Together

Command = (
    Annotated[Quality, tyro.conf.subcommand("quality")]
    | Annotated[Together, tyro.conf.subcommand("together")]
    | Annotated[Speed, tyro.conf.subcommand("speed")]
)

if __name__ == "__main__":
    tyro.cli(Command, description=__doc__, config=(tyro.conf.OmitSubcommandPrefixes,)).run()
