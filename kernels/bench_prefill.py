"""Time sparse prefill against dense attention of torch in the same run.

    python kernels/bench_prefill.py layer --output kernels/results/prefill_layer_cpu.json
    python kernels/bench_prefill.py layer --geometry "llama-3.1-8b, a quarter of the heads" --lengths 16384 32768 \\
        --dtypes fp32 --output kernels/results/prefill_llama_layer_cpu.json
    python kernels/bench_prefill.py first-token --output kernels/results/prefill_first_token_cpu.json

layer: one attention layer on random numbers, with plans of a given density.
first-token: a whole model that reads a text, with presets of sparse prefill.
Settings take turns; each number is the median of the repeats, in CPU time of one thread. "(0.25)" is the density: attended
pairs / pairs of a causal call.
"""

import os
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tyro

from dit_accel.bench.first_token import FirstToken
from dit_accel.bench.prefill_speed import PrefillSpeed

Command = (
    Annotated[PrefillSpeed, tyro.conf.subcommand("layer")]
    | Annotated[FirstToken, tyro.conf.subcommand("first-token")]
)

if __name__ == "__main__":
    tyro.cli(Command, description=__doc__, config=(tyro.conf.OmitSubcommandPrefixes,)).run()
