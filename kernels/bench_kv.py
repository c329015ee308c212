"""Measure key-value caches outside of a model.

    python kernels/bench_kv.py decode --output kernels/results/kv_decode_cpu.json
    python kernels/bench_kv.py search --output kernels/results/kv_search_cpu.json

decode: times of one attention layer that reads a long cache for a new token, against dense attention of torch in the same
run. Keys are random, 16 around each direction, so that clusters exist; queries point in these directions. Caches take
turns; each number is the median of the repeats, in CPU time of one thread. "bytes" and "read" are shares of a dense cache,
"error" is the relative error of the output.
search: share of the keys that an index compares to find most of the best ones, for queries unlike the keys.
"""

import os
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tyro

from dit_accel.bench.kv_decode import KVDecode
from dit_accel.bench.kv_search import KVSearch

Command = (
    Annotated[KVDecode, tyro.conf.subcommand("decode")]
    | Annotated[KVSearch, tyro.conf.subcommand("search")]
)

if __name__ == "__main__":
    tyro.cli(Command, description=__doc__, config=(tyro.conf.OmitSubcommandPrefixes,)).run()
