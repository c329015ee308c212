"""Times sparse attention against every dense attention of torch on the same inputs, in one run.

    python kernels/bench_attention.py --output kernels/results/cpu.json
    python kernels/bench_attention.py --device cuda --dtype bf16 --output kernels/results/gpu.json
    python kernels/bench_attention.py --parts crossover    # rewrites dit_accel/sla/crossover.json

Candidates run in turns; the result is the median of the repeats. Each mode is timed "all in" (routing, planning,
attention, linear branch, projection) and with its plan ready. "% of ideal" is the speed-up times the density:
100 % means that the time shrank exactly as much as the work. On a CPU it counts one thread's CPU time; the
crossover uses wall-clock time with all of torch's threads.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from tqdm import tqdm

from dit_accel.bench.timing import Functions, gpu_clocks, peak_gpu_bytes, seconds, summary
from dit_accel.environment import machine, versions
from dit_accel.files import write_json
from dit_accel.kernels import (
    SparsePlan,
    block_scores,
    block_sparse_attention,
    sparse_linear_attention,
)
from dit_accel.kernels.linear.features import features


@dataclass(frozen=True)
class Case:
    """One problem."""

    name: str
    heads: int
    length: int
    head_dim: int
    block_q: int
    block_k: int
    topk: float
    kv_heads: int | None = None
    backward: bool = False
    every_mode: bool = True
    """Time every mode and every dense attention; else the plain kernel and SDPA's own choice only."""


@dataclass
class Args:
    """Command line."""

    output: Path | None = None
    """Path of the results JSON. Default: print only."""
    device: str = "cpu"
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    repeats: int = 5
    parts: tuple[Literal["cases", "crossover"], ...] = ("cases",)
    """Parts to measure; the other part of an existing output file is kept. "crossover" also rewrites
    the table behind crossover="auto"."""
    only: str | None = None
    """Only the cases whose name contains this."""
    memory_of: str | None = None
    """Internal: measure the memory of one case (JSON) in this fresh process."""


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DENSE = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
MODES: dict[str, dict[str, str]] = {
    "none": {"combine": "none"},
    "shared_softmax": {"combine": "shared_softmax"},
    **{s: {"combine": "proj", "linear_scope": s} for s in ("all", "complement", "marginal")},
}
CROSSOVER_LENGTHS = (256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
GPU_LENGTHS = (*CROSSOVER_LENGTHS, 16384, 32768, 65536, 131072)


def cases(device: str) -> Iterator[Case]:
    if device == "cpu":
        head = Case("headline", 12, 8192, 128, 128, 128, 0.05)
        yield head
        yield replace(head, name="headline, forward + backward", backward=True)
        for topk in (0.1, 0.25, 0.5):
            yield replace(head, name="density", topk=topk, every_mode=False)
        yield replace(head, name="blocks of 64", block_q=64, block_k=64, topk=0.1, every_mode=False)
        for length in (2048, 4096, 16384):
            yield replace(head, name="length", heads=4, length=length, every_mode=False)
        yield Case("ragged", 4, 4001, 64, 64, 64, 0.1, every_mode=False)
        yield Case("grouped queries", 8, 4096, 64, 64, 64, 0.1, kv_heads=2, every_mode=False)
        return
    wan = Case("Wan2.1 1.3B 480p", 12, 32760, 128, 128, 64, 0.05)
    yield wan
    yield replace(wan, name="Wan2.1 1.3B 480p, forward + backward", backward=True)
    yield replace(wan, name="Wan2.1 14B 720p", heads=40, length=75600)
    for topk in (0.02, 0.1, 0.2, 0.4):
        yield replace(wan, name="density", topk=topk)
    for length in (2048, 4096, 8192, 16384, 65536, 131072):
        yield replace(wan, name="length", length=length, every_mode=False)
    yield Case("Lumina 2", 24, 4608, 96, 64, 64, 0.1, kv_heads=8)
    yield Case("head_dim 72", 16, 4608, 72, 64, 64, 0.1)
    yield Case("head_dim 64", 24, 17776, 64, 128, 64, 0.05)


def inputs(case: Case, device: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v `[1, H, L, D]`."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = [
        torch.randn(
            1, heads, case.length, case.head_dim, generator=generator, device=device, dtype=dtype
        )
        for heads in (case.heads, case.kv_heads or case.heads, case.kv_heads or case.heads)
    ]
    return [x.requires_grad_(case.backward) for x in tensors]


SKIP = 0.1
"""Blocks that the scope "marginal" leaves out."""


def make_plan(case: Case, q: Tensor, k: Tensor, skip: float = 0.0) -> SparsePlan:
    size = {"block_q": case.block_q, "block_k": case.block_k}
    scores = block_scores(q.detach(), k.detach(), **size)
    return SparsePlan.from_scores(
        scores, topk=case.topk, skip=skip, q_len=case.length, kv_len=case.length, **size
    )


def weight(case: Case, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(case.head_dim, case.head_dim, generator=generator) / case.head_dim**0.5
    return matrix.to(like)


def attend(mode: str, q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, proj: Tensor) -> Tensor:
    if mode == "none":
        return block_sparse_attention(q, k, v, plan)
    extra = {"proj_weight": proj} if MODES[mode]["combine"] == "proj" else {}
    return sparse_linear_attention(q, k, v, plan, **MODES[mode], **extra)  # type: ignore[arg-type]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def candidates(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Functions, Functions]:
    """Dense attentions, and ours: "mode" all in, "mode, planned", and the parts."""
    plan, proj = make_plan(case, q, k, SKIP), weight(case, q)

    def finish(o: Tensor) -> None:
        if case.backward:
            torch.autograd.grad(o, (q, k, v), torch.ones_like(o))

    def with_backend(backend: SDPBackend) -> Callable[[], None]:
        def run() -> None:
            with sdpa_kernel(backend):
                finish(dense(q, k, v))

        return run

    def all_in(mode: str) -> Callable[[], None]:
        skip = SKIP if mode == "marginal" else 0.0
        return lambda: finish(attend(mode, q, k, v, make_plan(case, q, k, skip), proj))

    def planned(mode: str) -> Callable[[], None]:
        return lambda: finish(attend(mode, q, k, v, plan, proj))

    theirs: Functions = {"sdpa": lambda: finish(dense(q, k, v))}
    ours: Functions = {"none": all_in("none"), "none, planned": planned("none")}
    if not case.every_mode:
        return theirs, ours
    # FlexAttention under the same mask, and what an fp32 score matrix in full would need.
    small = q.shape[1] * case.length**2 * 4 < 2**31
    for name, backend in DENSE.items():
        if (name != "math" or small) and (q.is_cuda or name == "math"):
            theirs[name] = with_backend(backend)
    compiled = torch.compile(flex_attention)
    block_mask = plan.to_flex()
    gqa = q.shape[1] != k.shape[1]
    theirs["flex, same mask"] = lambda: finish(
        compiled(q, k, v, block_mask=block_mask, enable_gqa=gqa)
    )
    for mode in MODES:
        ours |= {mode: all_in(mode), f"{mode}, planned": planned(mode)}
    ours["router and plan"] = lambda: make_plan(case, q, k)
    ours["feature maps"] = lambda: [features(x.detach(), "softmax") for x in (q, k)]
    ours["projection"] = lambda: F.linear(q.detach(), proj)
    return theirs, ours


def runnable(functions: Functions) -> tuple[Functions, dict[str, str]]:
    """Return the functions that run here, and the reasons why the others do not."""
    good, bad = {}, {}
    for name, function in functions.items():
        try:
            function()
            good[name] = function
        except Exception as error:  # a backend says in many ways that it does not support something
            bad[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
    return good, bad


def measure(case: Case, args: Args) -> dict[str, Any]:
    q, k, v = inputs(case, args.device, DTYPES[args.dtype])
    plan = make_plan(case, q, k, SKIP)
    theirs, ours = candidates(case, q, k, v)
    theirs, refused = runnable(theirs)
    found = seconds({**theirs, **ours}, args.repeats, args.device)
    rows = {name: summary(x) for name, x in found.items()}
    best = min((n for n in theirs if not n.startswith("flex")), key=lambda n: rows[n]["p50"])
    baseline = "flash" if "flash" in rows else "sdpa"
    density = plan.density()
    for row in rows.values():
        row["speedup"] = rows[baseline]["p50"] / row["p50"]
        row["speedup_over_best_dense"] = rows[best]["p50"] / row["p50"]
        row["percent_of_ideal"] = 100 * row["speedup"] * density
    result = {
        **asdict(case),
        "dtype": args.dtype,
        "density": density,
        "baseline": baseline,
        "best_dense": best,
        "seconds": rows,
        "refused": refused,
    }
    if "complement, planned" in rows:
        plain = rows["none, planned"]["p50"]
        product = rows["projection"]["p50"] * (3 if case.backward else 1)
        result["linear_branch_share"] = {
            # At inference the totals of "all" are projected, so no projection of rows is in its time.
            mode: (
                rows[f"{mode}, planned"]["p50"]
                - (0 if mode == "all" and not case.backward else product)
                - plain
            )
            / plain
            for mode in ("all", "complement", "marginal")
        }
    if args.device != "cpu":
        result["memory"] = gpu_memory(case, theirs, ours, baseline)
        result["relative_error"] = relative_errors(case, q, k, v, plan)
    elif not case.backward:
        result["memory"] = cpu_memory(case, args)
    return result


def gpu_memory(
    case: Case, theirs: Functions, ours: Functions, baseline: str
) -> dict[str, dict[str, float]]:
    """Peak MiB of each beyond its inputs, and as a share of the dense baseline's."""
    peaks = {n: peak_gpu_bytes(f) for n, f in {**theirs, **ours}.items() if n in (baseline, *MODES)}
    return {
        name: {"mib": x / 2**20, "share_of_dense": x / peaks[baseline]} for name, x in peaks.items()
    }


def relative_errors(
    case: Case, q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan
) -> dict[str, float]:
    """Norm of the error against fp32 torch under the same plan, four heads of it."""
    heads = slice(0, 4 * (q.shape[1] // k.shape[1]))
    few = [q[:, heads].detach(), k[:, :4].detach(), v[:, :4].detach()]
    plan = replace(
        plan,
        **{
            f"{kind}_{what}": getattr(plan, f"{kind}_{what}")[:, heads].contiguous()
            for kind in ("kv", "full_kv", "skip")
            for what in ("num_blocks", "indices")
        },
    )
    proj = weight(case, q)
    errors = {}
    for mode in MODES if case.every_mode else ("none",):
        exact = attend(mode, *(x.float() for x in few), plan, proj.float())
        errors[mode] = ((attend(mode, *few, plan, proj) - exact).norm() / exact.norm()).item()
    return errors


def cpu_memory(case: Case, args: Args) -> dict[str, float]:
    """Peak memory of one forward beyond inputs and output, as a share of both; a fresh process."""
    command = [sys.executable, __file__, "--memory-of", json.dumps(asdict(case))]
    command += ["--dtype", args.dtype]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def memory_in_this_process(case: Case, args: Args) -> dict[str, float]:
    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    with torch.no_grad():
        small = replace(case, heads=1, kv_heads=None, length=4 * case.block_q, topk=0.5)
        tensors = inputs(small, "cpu", DTYPES[args.dtype])
        block_sparse_attention(*tensors, make_plan(small, *tensors[:2]))
        q, k, v = inputs(case, "cpu", DTYPES[args.dtype])
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = status("VmRSS")
        o = block_sparse_attention(q, k, v, make_plan(case, q, k))
        extra = status("VmHWM") - before - o.nbytes
    share = extra / (q.nbytes + k.nbytes + v.nbytes + o.nbytes)
    return {"extra_share": share, "extra_mib": extra / 2**20}


def crossover_rows(args: Args) -> list[dict[str, Any]]:
    """Return, for each density and block, the first length from which sparse stays 1.25x faster than dense.

    With the margin, noise does not choose the slower attention.
    """
    cpu = args.device == "cpu"
    rows = []
    heads, head_dim, blocks = (2, 64, (16, 32, 64, 128)) if cpu else (12, 128, (64, 128))
    grid = [(topk, block) for topk in (0.1, 0.25, 0.4) for block in blocks]
    for topk, block in tqdm(grid, desc="crossover"):
        first: int | None = None
        ratios = {}
        for length in CROSSOVER_LENGTHS if cpu else GPU_LENGTHS:
            if length < 4 * block:
                continue
            case = Case("crossover", heads, length, head_dim, block, block, topk)
            ratios[length] = crossover_ratio(case, args)
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


def crossover_ratio(case: Case, args: Args) -> float:
    """Return the speed of sparse attention, all in, over torch's own choice of dense attention."""
    # As a transformer hands them over: heads interleaved, [B, L, H, D] in memory.
    q, k, v = (
        x.transpose(1, 2).contiguous().transpose(1, 2)
        for x in inputs(case, args.device, DTYPES[args.dtype])
    )
    both: Functions = {
        "dense": lambda: dense(q, k, v),
        "sparse": lambda: sparse_linear_attention(q, k, v, make_plan(case, q, k)),
    }
    repeats = max(args.repeats, 9 if case.length < 2048 else 3)
    found = seconds(both, repeats, args.device, wall=True)
    return statistics.median(found["dense"]) / statistics.median(found["sparse"])


def report(row: dict[str, Any]) -> None:
    """Prints what people compare."""
    what = "forward + backward" if row["backward"] else "forward"
    dense_ms = 1000 * row["seconds"][row["baseline"]]["p50"]
    print(
        f"\n{row['name']}: H={row['heads']} N={row['length']} d={row['head_dim']} blocks "
        f"{row['block_q']}/{row['block_k']} density {row['density']:.3f} {row['dtype']} {what}; "
        f"{row['baseline']} {dense_ms:.2f} ms, best dense {row['best_dense']}"
    )
    for name, x in row["seconds"].items():
        print(
            f"  {name:24} {1000 * x['p50']:10.3f} ms  {x['speedup']:7.2f}x  "
            f"{x['speedup_over_best_dense']:7.2f}x over best  {x['percent_of_ideal']:5.0f} % of ideal"
        )
    for key in ("linear_branch_share", "memory", "relative_error", "refused"):
        if row.get(key):
            print(f"  {key}: {row[key]}")


def write_crossover(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        wins = f"from {row['min_length']} tokens" if row["min_length"] else "nowhere"
        ratios = "  ".join(f"{n}: {x:.2f}x" for n, x in row["speedup_by_length"].items())
        print(f"topk {row['topk']} block {row['block']}: sparse wins {wins}  ({ratios})")
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
    clocks = [gpu_clocks()]

    def save() -> None:
        data["clocks"] = [*clocks, gpu_clocks()]
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.output, data)

    if "cases" in args.parts:
        # With --only, what other cases measured before stays in the file.
        data["rows"] = [
            row
            for row in data.get("rows", [])
            if args.only is not None and args.only not in row["name"]
        ]
        wanted = [c for c in cases(args.device) if args.only is None or args.only in c.name]
        for case in tqdm(wanted, desc="cases"):
            data["rows"].append(measure(case, args))
            report(data["rows"][-1])
            save()
    if "crossover" in args.parts:
        torch.set_num_threads(threads)
        data["crossover"] = crossover_rows(args)
        write_crossover(data["crossover"])
        save()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
