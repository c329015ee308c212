"""Times of one attention layer that reads a long cache for a new token, against dense attention of torch in the same run.

    python kernels/bench_kv.py --output kernels/results/kv_decode_cpu.json

Keys are random, 16 around each direction, so that clusters have something to find; queries point in such directions.
Ways take turns; each number is the median of the repeats, in CPU time of one thread. "bytes" and "read" are shares of a
dense cache; "error" is that of the output.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tyro

from dit_accel.bench.kv_decode import KVDecode

if __name__ == "__main__":
    tyro.cli(KVDecode, description=__doc__).run()
