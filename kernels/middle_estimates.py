"""Show how the estimates of prefill patterns rank the blocks of the answers in the task "middle" of `dit-accel llm bench`.

    python kernels/middle_estimates.py --length 4096 --prompts 2

In this task 4 of the 64 queries of one block look up single keys; the other 60 attend to scattered keys. A row of the
first table is one look-up. It has the rank of the block with the key among all previous blocks, by the exact attention of
the query block, by sums of antidiagonals (xattention, hybrid) and by corrected means (blocks, flex_prefill). The second
table counts the look-ups whose key is read. "exact" is a pattern with the exact attention: the fewest blocks that have
0.9 of it.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tyro

from dit_accel.bench.middle_estimates import MiddleEstimates

if __name__ == "__main__":
    tyro.cli(MiddleEstimates, description=__doc__).run()
