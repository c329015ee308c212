"""Compare products split in 64 + 16 or 64 + 32 channels with padding to 128, for head_dim 72 and 96, as compiled.

python kernels/split_head_dim.py --append-to docs/kernel-table.md
"""

import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import tyro

from dit_accel.bench.split_head_dim import SplitHeadDim

if __name__ == "__main__":
    tyro.cli(SplitHeadDim, description=__doc__).run()
