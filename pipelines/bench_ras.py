"""What region-adaptive sampling costs in time and quality, all rows in one run.

    python pipelines/bench_ras.py overhead --output pipelines/results/ras_overhead_cpu.json
    python pipelines/bench_ras.py overhead --device cuda --output pipelines/results/ras_overhead_gpu.json
    python pipelines/bench_ras.py quality --model tiny-wan --output pipelines/results/ras_tiny_wan.json

Overhead: seconds of a region-adaptive step against a dense one of the same run, over the ratio of the
FLOPs that they count (`Family.flops`). Quality: paired seeds against the model's own 100-step dense
output from the same noise; every row names the cost it had, and "dense, equal cost" is the plain
pipeline with as many steps, rounded up. A run that was stopped goes on where it was.
"""

import os
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tyro

from dit_accel.bench.ras_overhead import Overhead
from dit_accel.bench.ras_quality import Quality

Command = (
    Annotated[Overhead, tyro.conf.subcommand("overhead")]
    | Annotated[Quality, tyro.conf.subcommand("quality")]
)

if __name__ == "__main__":
    tyro.cli(Command, description=__doc__, config=(tyro.conf.OmitSubcommandPrefixes,)).run()
