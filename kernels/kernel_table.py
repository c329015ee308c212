"""Compile every Triton kernel for every chip, none of which need be present, and write the resources of each kernel.

    python kernels/kernel_table.py --output docs/kernel-table.md
    python kernels/kernel_table.py --targets 90 --head-dims 128 --check

The JSON file (`--json`) has the same data by loop: instructions by class, products, waits, prediction.
"""

import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import tyro

from dit_accel.bench.kernel_table import KernelTable

if __name__ == "__main__":
    tyro.cli(KernelTable, description=__doc__).run()
