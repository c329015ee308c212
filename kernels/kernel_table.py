"""Compiles every Triton kernel for chips that need not be here, and writes what each takes of them.

python kernels/kernel_table.py --output docs/kernel-table.md
python kernels/kernel_table.py --targets 90 --head-dims 128 --check
"""

import os
import sys
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
import tyro
from tqdm import tqdm

from dit_accel.files import atomic_path
from dit_accel.kernels.aot import Usage, compile_launch
from dit_accel.kernels.block_sparse.tiles import Target
from dit_accel.kernels.catalogue import catalogue

Chip = Literal["80", "89", "90", "100", "gfx942"]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
SHARED_KIB = {"80": 163, "89": 99, "90": 227, "100": 227, "gfx942": 64}
MATRIX = {"80": "mma.sync", "89": "mma.sync", "90": "wgmma", "100": "tcgen05", "gfx942": "mfma"}
# These walk no tiles of keys or queries: nothing to multiply, or nothing to prefetch.
NO_PRODUCT = ("merge/split rows", "pool/router", "pool/spread")
NO_WALK = (*NO_PRODUCT, "linear_columns/linear all")


@dataclass
class Args:
    """Command line."""

    targets: tuple[Chip, ...] = ("80", "89", "90", "100", "gfx942")
    head_dims: tuple[int, ...] = (64, 72, 96, 128, 256)
    dtypes: tuple[Literal["fp16", "bf16"], ...] = ("fp16", "bf16")
    output: Path | None = None
    """Markdown file. Default: print only."""
    check: bool = False
    """Exit with 1 if a bound is missed."""
    processes: int = 2


@dataclass(frozen=True)
class Job:
    chip: str
    head_dim: int
    dtype: str
    name: str


def target_of(chip: str) -> Target:
    return Target("hip" if chip.startswith("gfx") else "cuda", chip)


def compile_job(job: Job) -> Usage:
    launches = catalogue(target_of(job.chip), job.head_dim, DTYPES[job.dtype])
    return compile_launch(launches[job.name], target_of(job.chip))


def missed(job: Job, usage: Usage) -> list[str]:
    """The bounds that a kernel misses."""
    strict = job.head_dim <= 128 and job.chip in ("80", "90", "100")
    found = []
    if usage.spills > (0 if strict else 128):
        found.append(f"{usage.spills} B of spills")
    if usage.shared > SHARED_KIB[job.chip] * 1024:
        found.append(f"{usage.shared // 1024} KiB of shared memory")
    if job.name not in NO_PRODUCT and MATRIX[job.chip] not in usage.matrix:
        found.append(f"no {MATRIX[job.chip]}, but {', '.join(usage.matrix) or 'nothing'}")
    pipelined = job.name not in NO_WALK and usage.stages > 1 and not job.chip.startswith("gfx")
    if pipelined and not usage.async_copies:
        found.append("no asynchronous copies")
    return found


def markdown(results: dict[Job, Usage], args: Args) -> Iterable[str]:
    yield "# What the kernels take of a chip\n"
    yield (
        "Written by `make kernel-table`: every kernel in every mode that differs in code, compiled ahead "
        f"of time with triton {triton.__version__}, blocks of 64, 16,384 tokens. It is evidence about "
        "registers, spills, memory and instructions, not about speed.\n"
    )
    yield (
        "regs: per thread. spills: bytes of spill stores per thread. shared: KiB per program "
        f"(limits: {', '.join(f'{c} {k}' for c, k in SHARED_KIB.items())}). matrix: matrix instructions in "
        "the assembly. async: asynchronous copies. Two numbers: fp16 / bf16. head_dim 256 runs its linear "
        "branch outside the kernels.\n"
    )
    misses: dict[str, list[str]] = defaultdict(list)
    for job, usage in results.items():
        for what in missed(job, usage):
            misses[f"{job.chip}, {job.name}: {what}"].append(f"{job.dtype} d={job.head_dim}")
    yield f"## Bounds missed: {len(misses)}\n"
    yield (
        "Bounds: no spills up to head_dim 128 on sm_80, sm_90 and sm_100, at most 128 B elsewhere; shared "
        "memory within the limit; the chip's own matrix instruction; asynchronous copies where tiles are "
        "pipelined.\n"
    )
    for what, where in misses.items():
        yield f"- {what} ({', '.join(where)})"
    if misses:
        yield ""
    for chip in args.targets:
        yield f"## {chip if chip.startswith('gfx') else 'sm_' + chip}\n"
        yield "| kernel / mode | head_dim | warps, stages | regs | spills | shared | matrix | async |"
        yield "|---|---|---|---|---|---|---|---|"
        for head_dim in args.head_dims:
            names = dict.fromkeys(
                j.name for j in results if (j.chip, j.head_dim) == (chip, head_dim)
            )
            for name in names:
                rows = [results[Job(chip, head_dim, dtype, name)] for dtype in args.dtypes]

                def both(values: Iterable[object]) -> str:
                    return " / ".join(dict.fromkeys(map(str, values)))

                matrix = both(
                    " ".join(f"{n} {kind}" for kind, n in u.matrix.items()) or "-" for u in rows
                )
                yield (
                    f"| {name} | {head_dim} | {rows[0].warps}, {rows[0].stages} | "
                    f"{both(u.registers for u in rows)} | {both(u.spills for u in rows)} | "
                    f"{both(round(u.shared / 1024, 1) for u in rows)} | {matrix} | "
                    f"{both(u.async_copies for u in rows)} |"
                )
        yield ""


def main(args: Args) -> None:
    jobs = [
        Job(chip, head_dim, dtype, name)
        for chip in args.targets
        for head_dim in args.head_dims
        for dtype in args.dtypes
        for name in catalogue(target_of(chip), head_dim, DTYPES[dtype])
    ]
    with ProcessPoolExecutor(args.processes) as pool:
        usages = tqdm(pool.map(compile_job, jobs), total=len(jobs), desc="compiling")
        results = dict(zip(jobs, usages, strict=True))
    text = "\n".join(markdown(results, args)) + "\n"
    if args.output is None:
        print(text)
    else:
        with atomic_path(args.output) as path:
            path.write_text(text)
    failures = sum(bool(missed(job, usage)) for job, usage in results.items())
    print(f"{len(jobs)} compiled, {failures} miss a bound", file=sys.stderr)
    if args.check and failures:
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
