"""Times sparse attention against torch's SDPA on the same inputs, in one run, and its memory.

    python kernels/bench_attention.py --output kernels/results/cpu.json
    python kernels/bench_attention.py --parts crossover    # rewrites dit_accel/sla/crossover.json

Each measurement alternates the candidates and reports the median of the repeats; on a CPU it counts
one thread's CPU time, which other processes disturb less than the clock on the wall. "% of ideal" is
the speed-up times the density: 100 % means that the time shrank exactly as much as the work. The crossover
is measured as people feel it: wall-clock time with all of torch's threads.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

from dit_accel.environment import machine, versions
from dit_accel.files import write_json
from dit_accel.kernels import (
    SparsePlan,
    block_scores,
    block_sparse_attention,
    sparse_linear_attention,
)


@dataclass(frozen=True)
class Case:
    """One problem."""

    heads: int
    length: int
    head_dim: int
    block: int
    topk: float
    backward: bool = False


@dataclass
class Args:
    """Command line."""

    output: Path | None = None
    """Where the results JSON goes. Default: print only."""
    device: str = "cpu"
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    repeats: int = 5
    parts: tuple[Literal["cases", "crossover"], ...] = ("cases",)
    """What to measure; the other part of an existing output file is kept. "crossover" also rewrites
    the table behind crossover="auto"."""
    memory_of: str | None = None
    """Internal: measure the memory of one case (JSON) in this fresh process."""


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADLINE = [Case(heads=12, length=8192, head_dim=128, block=128, topk=topk) for topk in (0.05, 0.1)]
MORE = [
    Case(heads=12, length=8192, head_dim=128, block=128, topk=0.25),
    Case(heads=12, length=8192, head_dim=128, block=64, topk=0.1),
    Case(heads=4, length=2048, head_dim=128, block=64, topk=0.1),
    Case(heads=4, length=4001, head_dim=64, block=64, topk=0.1),
    Case(heads=4, length=4096, head_dim=64, block=64, topk=0.1, backward=True),
]
CROSSOVER_LENGTHS = (256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)


def inputs(case: Case, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, case.heads, case.length, case.head_dim)
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]
    return [x.requires_grad_(case.backward) for x in tensors]


def make_plan(case: Case, q: torch.Tensor, k: torch.Tensor) -> SparsePlan:
    size = {"block_q": case.block, "block_k": case.block}
    scores = block_scores(q, k, **size)
    return SparsePlan.from_scores(
        scores, topk=case.topk, q_len=case.length, kv_len=case.length, **size
    )


def candidates(
    case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> dict[str, Callable[[], Any]]:
    """What is timed; "kernel" has its plan ready, the others route every time."""
    plan = make_plan(case, q.detach(), k.detach())

    def finish(o: torch.Tensor) -> None:
        if case.backward:
            torch.autograd.grad(o, (q, k, v), torch.ones_like(o))

    return {
        "sdpa": lambda: finish(F.scaled_dot_product_attention(q, k, v)),
        "kernel": lambda: finish(block_sparse_attention(q, k, v, plan)),
        "router": lambda: make_plan(case, q.detach(), k.detach()),
        "none": lambda: finish(
            block_sparse_attention(q, k, v, make_plan(case, q.detach(), k.detach()))
        ),
        "shared_softmax": lambda: finish(
            sparse_linear_attention(q, k, v, make_plan(case, q.detach(), k.detach()))
        ),
    }


def timed(
    functions: dict[str, Callable[[], Any]],
    repeats: int,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each candidate, alternating."""

    def once(function: Callable[[], Any]) -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        start = clock()
        function()
        if device != "cpu":
            torch.cuda.synchronize()
        return clock() - start

    for function in functions.values():
        once(function)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(once(function))
    return seconds


def measure(case: Case, args: Args) -> dict[str, Any]:
    q, k, v = inputs(case, args.device, DTYPES[args.dtype])
    density = make_plan(case, q.detach(), k.detach()).density()
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    seconds = timed(candidates(case, q, k, v), args.repeats, args.device, clock)
    median = {name: statistics.median(x) for name, x in seconds.items()}
    rows = {}
    for name, x in seconds.items():
        quartiles = statistics.quantiles(x, n=5) if len(x) > 1 else [x[0]] * 4
        speedup = median["sdpa"] / median[name]
        rows[name] = {
            "p20": quartiles[0],
            "p50": median[name],
            "p80": quartiles[-1],
            "speedup": speedup,
        }
        if name not in ("sdpa", "router"):
            rows[name]["percent_of_ideal"] = 100 * speedup * density
    return {**asdict(case), "dtype": args.dtype, "density": density, "seconds": rows}


def extra_memory(case: Case, args: Args) -> dict[str, float]:
    """Peak memory of one forward beyond inputs and output, as a share of both; a fresh process."""
    if args.device != "cpu":
        q, k, v = inputs(case, args.device, DTYPES[args.dtype])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        o = sparse_linear_attention(q, k, v, make_plan(case, q, k), combine="none")
        extra = torch.cuda.max_memory_allocated() - before - o.nbytes
        return {"extra_share": extra / (4 * q.nbytes), "extra_mib": extra / 2**20}
    command = [
        sys.executable,
        __file__,
        "--memory-of",
        json.dumps(asdict(case)),
        "--dtype",
        args.dtype,
    ]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def memory_in_this_process(case: Case, args: Args) -> dict[str, float]:
    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    with torch.no_grad():
        small = inputs(
            Case(1, 4 * case.block, case.head_dim, case.block, 0.5), "cpu", DTYPES[args.dtype]
        )
        block_sparse_attention(
            *small, make_plan(Case(1, 4 * case.block, case.head_dim, case.block, 0.5), *small[:2])
        )
        q, k, v = inputs(case, "cpu", DTYPES[args.dtype])
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = status("VmRSS")
        o = block_sparse_attention(q, k, v, make_plan(case, q, k))
        extra = status("VmHWM") - before - o.nbytes
    return {"extra_share": extra / (3 * q.nbytes + o.nbytes), "extra_mib": extra / 2**20}


def crossover_rows(args: Args) -> list[dict[str, Any]]:
    """For each density and block: the first length from which sparse stays 1.25x faster than dense.

    The margin keeps a noisy measurement from sending people to the slower side.
    """
    rows = []
    grid = [(topk, block) for topk in (0.1, 0.25, 0.4) for block in (16, 32, 64, 128)]
    for topk, block in tqdm(grid, desc="crossover"):
        first: int | None = None
        ratios = {}
        for length in CROSSOVER_LENGTHS:
            if length < 4 * block:
                continue
            case = Case(heads=2, length=length, head_dim=64, block=block, topk=topk)
            # As a transformer hands them over: heads interleaved, [B, L, H, D] in memory.
            q, k, v = (
                x.transpose(1, 2).contiguous().transpose(1, 2)
                for x in inputs(case, args.device, DTYPES[args.dtype])
            )
            both = {
                name: f
                for name, f in candidates(case, q, k, v).items()
                if name in ("sdpa", "shared_softmax")
            }
            seconds = timed(both, max(args.repeats, 9 if length < 2048 else 3), args.device)
            ratios[length] = statistics.median(seconds["sdpa"]) / statistics.median(
                seconds["shared_softmax"]
            )
            first = (first or length) if ratios[length] > 1.25 else None
        rows.append(
            {
                "device": args.device.split(":")[0],
                "topk": topk,
                "block": block,
                "min_length": first,
                "threads": torch.get_num_threads(),
                "speedup_by_length": {str(n): round(x, 3) for n, x in ratios.items()},
            }
        )
    return rows


def measure_cases(args: Args) -> list[dict[str, Any]]:
    results = []
    for case in tqdm(HEADLINE + MORE, desc="cases"):
        row = measure(case, args)
        if not case.backward:
            row["memory"] = extra_memory(case, args)
        results.append(row)
        numbers = "  ".join(
            f"{name} {x['speedup']:.2f}x ({x['percent_of_ideal']:.0f} %)"
            for name, x in row["seconds"].items()
            if "percent_of_ideal" in x
        )
        memory = (
            f"  extra memory {100 * row['memory']['extra_share']:.1f} %" if "memory" in row else ""
        )
        what = "forward+backward" if case.backward else "forward"
        print(
            f"H={case.heads} N={case.length} d={case.head_dim} blocks {case.block} "
            f"density {row['density']:.3f} {what}: sdpa {row['seconds']['sdpa']['p50']:.3f} s  "
            f"{numbers}{memory}"
        )
    return results


def write_crossover(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        wins = f"from {row['min_length']} tokens" if row["min_length"] else "nowhere"
        print(f"topk {row['topk']} block {row['block']}: sparse wins {wins}")
    table = Path(__file__).parents[1] / "dit_accel" / "sla" / "crossover.json"
    kept = [
        row for row in json.loads(table.read_text())["rows"] if row["device"] != rows[0]["device"]
    ]
    write_json(table, {"format_version": 1, "rows": kept + rows})


def main(args: Args) -> None:
    threads = torch.get_num_threads()
    if args.device == "cpu":
        torch.set_num_threads(1)
    if args.memory_of is not None:
        print(json.dumps(memory_in_this_process(Case(**json.loads(args.memory_of)), args)))
        return
    data: dict[str, Any] = {}
    if args.output is not None and args.output.exists():
        data = json.loads(args.output.read_text())
    data |= {"format_version": 1, "versions": versions(), "machine": machine()}
    if "cases" in args.parts:
        data["rows"] = measure_cases(args)
    if "crossover" in args.parts:
        torch.set_num_threads(threads)
        data["crossover"] = crossover_rows(args)
        write_crossover(data["crossover"])
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, data)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
