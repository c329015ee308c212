"""Peak memory of sparse attention on a CPU, measured in a fresh process."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dit_accel.bench.attention_cases import DTYPES, Case, inputs, make_plan
from dit_accel.kernels import sparse_linear_attention


def cpu_memory(case: Case, dtype: str) -> dict[str, float]:
    """Return the result of `forward_memory` from a fresh process."""
    command = [sys.executable, "-m", __name__, json.dumps(asdict(case)), dtype]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def forward_memory(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """Return the peak memory of one forward pass in this process, without inputs and output: in MiB and as a share of them.

    The process must be fresh, because freed memory may stay with the allocator. Linux only.
    """

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    with torch.no_grad():
        small = replace(case, heads=1, kv_heads=None, length=4 * case.block_q, topk=0.5)
        q, k, v = inputs(small, "cpu", dtype)
        sparse_linear_attention(q, k, v, make_plan(small, q, k))
        q, k, v = inputs(case, "cpu", dtype)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = status("VmRSS")
        o = sparse_linear_attention(q, k, v, make_plan(case, q, k))
        extra = status("VmHWM") - before - o.nbytes
    share = extra / (q.nbytes + k.nbytes + v.nbytes + o.nbytes)
    return {"extra_share": share, "extra_mib": extra / 2**20}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(forward_memory(Case(**json.loads(sys.argv[1])), DTYPES[sys.argv[2]])))
