"""Check and measure every kernel on a GPU within a few minutes, unattended.

    python kernels/gpu_check.py --out DIR --budget 480            # a GPU, torch, triton, jaxtyping, numpy; no network
    python kernels/gpu_check.py --out DIR --budget 480 --resume   # resumes after the last finished sub-step
    python kernels/gpu_check.py --dry --dry-limit 24              # no GPU: compiles ahead of time for --arch
    python kernels/gpu_check.py --list

Steps, each of several sub-steps, in this order: ceilings (clocks, bf16 product, memory bandwidth), compile (in
parallel), yardstick (dense attentions), checks (every mode against plain formulas), speed, backward, tiles, profile
(launches, kernels, host), crossover, prefill (long prompts), memory, flex. A sub-step that
does not fit into the remaining time is skipped.

DIR/gpu_check.json is rewritten after every sub-step; DIR/gpu_check.md is its summary. Schema:

    format_version   1
    dry              true: nothing was measured; all numbers are placeholders
    device, capability, source, commit, versions, machine, budget_s     environment of the run; `source` is a hash of the code
    clocks           [{before: step, clocks.sm: text, ...}]             from the driver
    running          null, or {id, since, limit_s}                      running sub-step
    steps            {"step/name": entry}
      entry          {status: "done", seconds, result} or {status: "failed" | "crashed", seconds, error} or
                     {status: "skipped", reason}
      result         depends on the step; times under "ms" are {name: {p20, p50, p80}} in milliseconds, all measured in
                     turns; "refused" has functions that failed, with the error; "ratios" has tflops (rate of attended
                     FLOPs), x_flash (speed-up over SDPA flash) and of_yardstick (rate / rate of the dense Triton
                     kernel); checks have passed, repeats (two runs are bit-equal) and errors {name: [error, allowed]}
    bounds           [{bound, least, value, verdict: "met" | "missed" | "not measured"}]

Exit status: 0 no failure, 1 a check or a sub-step failed, 2 bad arguments, 143 stopped by a signal.
"""

import os
import sys
from pathlib import Path

# The package need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# All processes must compile with the same setting, or they do not share Triton's cache.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from dit_accel.bench.gpu.command import main, parse

if __name__ == "__main__":
    try:
        sys.exit(main(parse(__doc__), __file__))
    except ValueError as error:
        sys.exit(str(error))
