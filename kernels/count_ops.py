"""Count the operations that a sparse attention call starts on a GPU, and time its Python code. Needs no GPU.

    python kernels/count_ops.py --output kernels/results/launches.json
    python kernels/count_ops.py --check

A call at inference, from q, k and v to the output, with router and plan: torch operators that run on the device, Triton
launches by name, and waits for the device. Tensors have no memory ("meta"), so nothing is computed. The Python code is
timed on small CPU tensors without kernels; its time depends on this machine.
"""

import tyro

from dit_accel.bench.launch_counts import LaunchCounts

if __name__ == "__main__":
    tyro.cli(LaunchCounts, description=__doc__).run()
