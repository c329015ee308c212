"""Benchmark of sparse attention against dense attention of torch (kernels/bench_attention.py)."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from tqdm import tqdm

from dit_accel.bench.attention_cases import (
    DTYPES,
    MODES,
    SKIP,
    Case,
    attend,
    cases,
    dense,
    inputs,
    make_plan,
    weight,
)
from dit_accel.bench.attention_crossover import crossover_rows, write_crossover
from dit_accel.bench.attention_memory import cpu_memory
from dit_accel.bench.timing import Functions, gpu_clocks, peak_gpu_bytes, seconds, summary
from dit_accel.environment import machine, versions
from dit_accel.files import write_json
from dit_accel.kernels import SparsePlan
from dit_accel.kernels.linear.features import features

DENSE = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass
class AttentionSpeed:
    """Times of sparse attention and of every dense attention of torch, on the same inputs and in turns."""

    output: Path | None = None
    """Results file. Default: print only."""
    device: str = "cpu"
    """"cpu" or a CUDA device."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    repeats: int = 5
    """Number of timed calls of each function."""
    parts: tuple[Literal["cases", "crossover"], ...] = ("cases",)
    """Parts to measure. The other part of an existing output file is kept. "crossover" also rewrites the table of
    crossover="auto"."""
    only: str | None = None
    """Measure only cases whose name contains this text."""

    def run(self) -> None:
        """Measure, print, and write after each case."""
        threads = torch.get_num_threads()
        if self.device == "cpu":
            torch.set_num_threads(1)
        data: dict[str, Any] = {}
        if self.output is not None and self.output.exists():
            data = json.loads(self.output.read_text())
        data |= {"format_version": 1, "versions": versions(), "machine": machine()}
        clocks = [gpu_clocks()]

        def save() -> None:
            data["clocks"] = [*clocks, gpu_clocks()]
            if self.output is not None:
                self.output.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.output, data)

        if "cases" in self.parts:
            # With `only`, rows of other cases stay in the file.
            data["rows"] = [
                row
                for row in data.get("rows", [])
                if self.only is not None and self.only not in row["name"]
            ]
            wanted = [c for c in cases(self.device) if self.only is None or self.only in c.name]
            for case in tqdm(wanted, desc="cases"):
                data["rows"].append(measure(case, self.device, self.dtype, self.repeats))
                report(data["rows"][-1])
                save()
        if "crossover" in self.parts:
            torch.set_num_threads(threads)
            data["crossover"] = crossover_rows(self.device, self.dtype, self.repeats)
            write_crossover(data["crossover"])
            save()


def candidates(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Functions, Functions]:
    """Return functions for dense attention and for sparse attention, by name.

    A mode alone is a whole call, "mode, planned" a call with its plan ready. Other names are parts of a call.
    """
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
    # The math backend only if a full fp32 score matrix fits into memory.
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
    """Return the functions that run on this machine, and the errors of the others."""
    good, bad = {}, {}
    for name, function in functions.items():
        try:
            function()
            good[name] = function
        except Exception as error:  # backends raise many kinds of errors for unsupported calls
            bad[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
    return good, bad


def measure(case: Case, device: str, dtype: str, repeats: int) -> dict[str, Any]:
    """Return the times, speed-ups and memory of a problem."""
    q, k, v = inputs(case, device, DTYPES[dtype])
    plan = make_plan(case, q, k, SKIP)
    theirs, ours = candidates(case, q, k, v)
    theirs, refused = runnable(theirs)
    found = seconds({**theirs, **ours}, repeats, device)
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
        "dtype": dtype,
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
            # At inference the totals of "all" are projected, so its time has no projection of rows.
            mode: (
                rows[f"{mode}, planned"]["p50"]
                - (0 if mode == "all" and not case.backward else product)
                - plain
            )
            / plain
            for mode in ("all", "complement", "marginal")
        }
    if device != "cpu":
        result["memory"] = gpu_memory(case, theirs, ours, baseline)
        result["relative_error"] = relative_errors(case, q, k, v, plan)
    elif not case.backward:
        result["memory"] = cpu_memory(case, dtype)
    return result


def gpu_memory(
    case: Case, theirs: Functions, ours: Functions, baseline: str
) -> dict[str, dict[str, float]]:
    """Return the peak memory of each function without inputs, in MiB and as a share of that of the dense baseline."""
    peaks = {n: peak_gpu_bytes(f) for n, f in {**theirs, **ours}.items() if n in (baseline, *MODES)}
    return {
        name: {"mib": x / 2**20, "share_of_dense": x / peaks[baseline]} for name, x in peaks.items()
    }


def relative_errors(
    case: Case, q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan
) -> dict[str, float]:
    """Return the relative error (norm) against fp32 under the same plan, for four key heads."""
    heads = slice(0, 4 * (q.shape[1] // k.shape[1]))
    q, k, v = q[:, heads].detach(), k[:, :4].detach(), v[:, :4].detach()
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
        exact = attend(mode, q.float(), k.float(), v.float(), plan, proj.float())
        errors[mode] = ((attend(mode, q, k, v, plan, proj) - exact).norm() / exact.norm()).item()
    return errors


def report(row: dict[str, Any]) -> None:
    """Print times, speed-ups and memory of a problem."""
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
