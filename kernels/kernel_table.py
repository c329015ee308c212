"""Compile every Triton kernel for chips that need not be present, and write the resources that each kernel uses.

    python kernels/kernel_table.py --output docs/kernel-table.md
    python kernels/kernel_table.py --targets 90 --head-dims 128 --check

The JSON file beside the table holds the same by loop: instructions by class, products, waits, prediction.
"""

import contextlib
import functools
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
import tyro
from tqdm import tqdm

from dit_accel.files import atomic_path, check_file
from dit_accel.kernels.aot import compile_launch
from dit_accel.kernels.block_sparse.tiles import Target
from dit_accel.kernels.catalogue import catalogue
from dit_accel.kernels.chips import CHIPS
from dit_accel.kernels.launch import Launch
from dit_accel.kernels.usage import Usage, missed

Name = Literal["80", "89", "90", "100", "120", "gfx942"]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Others are compiled and checked, and appear where they miss a bound: 72 and 96 have the tiles of 128.
SHOWN = (64, 128)


@dataclass
class Args:
    """Command line."""

    targets: tuple[Name, ...] = ("80", "89", "90", "100", "120", "gfx942")
    head_dims: tuple[int, ...] = (64, 72, 96, 128, 256)
    dtypes: tuple[Literal["fp16", "bf16"], ...] = ("bf16",)
    """fp16 compiles to the same code but for conversions: no bound ever differed."""
    output: Path | None = None
    """Markdown file. Default: print only."""
    json: Path | None = None
    """JSON file with everything by loop. Default: none."""
    check: bool = False
    """Exit with 1 if a bound is missed."""
    processes: int = os.cpu_count() or 1
    """1: no process but this one."""


@dataclass(frozen=True)
class Job:
    """One kernel in one mode for one chip."""

    chip: str
    head_dim: int
    dtype: str
    name: str


def target_of(chip: str) -> Target:
    return Target("hip" if chip.startswith("gfx") else "cuda", chip)


@functools.cache
def launches(chip: str, head_dim: int, dtype: str) -> dict[str, Launch]:
    """Every launch of a chip, kept per process because building them takes as long as one compilation."""
    return catalogue(target_of(chip), head_dim, DTYPES[dtype])


def compile_job(job: Job) -> Usage:
    launch = launches(job.chip, job.head_dim, job.dtype)[job.name]
    try:
        return compile_launch(launch, target_of(job.chip))
    except Exception as error:
        raise RuntimeError(f"{job} does not compile: {error}") from error


def misses_of(job: Job, usage: Usage) -> list[str]:
    return missed(job.chip, job.head_dim, usage)


def row(job: Job, usage: Usage) -> str:
    """One line of a chip's table. Loops are divided by slashes."""

    def by_loop(values: Iterable[object]) -> str:
        return " / ".join("-" if x is None else str(x) for x in values) or "-"

    def count(name: str) -> str:
        return by_loop(x.instructions.get(name, 0) for x in usage.loops)

    tile = " ".join(f"{name} {size}" for name, size in usage.tile.items()) or "-"
    cells = (
        job.name,
        f"{job.head_dim} {job.dtype}",
        tile,
        f"{usage.warps}, {usage.stages}",
        usage.registers,
        f"{usage.spills}, {usage.stack}",
        f"{usage.shared / 1024:.1f}",
        usage.programs,
        by_loop(x.wait for x in usage.loops),
        by_loop(x.total for x in usage.loops),
        count("matrix"),
        count("special"),
        count("fp"),
        by_loop(x.instructions.get("int", 0) + x.instructions.get("imad", 0) for x in usage.loops),
        by_loop(usage.predicted),
    )
    return f"| {' | '.join(map(str, cells))} |"


HEAD = """# What the kernels take of a chip

Written by `make kernel-table`: every kernel in every mode that differs in code, compiled ahead of time with triton
{triton}, blocks of 64, 16,384 tokens. It is evidence about registers, memory and instructions. **Nothing here was
measured**: the last column is a model's prediction (`dit_accel/kernels/predicted.py`).

- d: head_dim and dtype. tile: queries (TQ), keys (TK), tokens (TL), value dims (TV). regs: registers per thread.
  spills, stack: bytes of spill stores and of local memory per thread. shared: KiB per program (limits: {limits}).
  per SM: programs that fit at a time.
- The other columns are about main loops, the innermost loops with matrix instructions, in the order of the code,
  divided by slashes. For the forward kernel: full blocks, partial blocks, then extra keys or blocks.
- wait: the smallest number of groups of asynchronous copies that may be under way when a step waits for its data. 0: no
  load overlaps with arithmetic. mbarrier: bulk copies. -: no asynchronous copies (gfx942 has none).
- instr, matrix, special (exp2 and the like), fp, int: instructions of a warp in one step.
- predicted: share of the matrix units' throughput in percent, by a model of one step. `<=`: an upper bound, because
  latencies of the chip are not known. -: no number, because the kernel has no loop or does not fit.

head_dim 256 runs its linear branch outside the kernels. The table shows head_dim 64 and 128; other head_dims appear
where they miss a bound. Compiled for this table: head_dim {head_dims}. Everything by loop: `{json}`.
"""
BOUNDS = """Bounds: no spills up to head_dim 128 on sm_80, sm_90 and sm_100, at most 128 B elsewhere; shared memory within the
limit; in main loops the chip's own matrix instruction and, with more than one stage, no `async_wait` 0 and no
loads that are not asynchronous. gfx942 is exempt from the last: its loads fill registers. No loop is exempt
for being rare. On sm_80, sm_90 and sm_100 spills in a main loop are named apart: elsewhere a program pays them once.
"""
COLUMNS = (
    "kernel / mode", "d", "tile", "warps, stages", "regs", "spills, stack", "shared", "per SM", "wait", "instr",
    "matrix", "special", "fp", "int", "predicted",
)  # fmt: skip


def markdown(results: dict[Job, Usage], args: Args) -> Iterable[str]:
    limits = ", ".join(f"{label(name)} {CHIPS[name].shared_kib}" for name in args.targets)
    yield HEAD.format(
        triton=triton.__version__,
        limits=limits,
        head_dims=", ".join(map(str, args.head_dims)),
        json=args.json or "--json",
    )
    misses: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for job, usage in results.items():
        for what in misses_of(job, usage):
            at = str(job.head_dim) if len(args.dtypes) == 1 else f"{job.head_dim} {job.dtype}"
            misses[f"{label(job.chip)}, {what}"][job.name].append(at)
    yield f"## Bounds missed: {sum(len(x) for x in misses.values())}\n"
    yield BOUNDS
    for what, names in misses.items():
        where = "; ".join(f"{name} ({', '.join(at)})" for name, at in names.items())
        yield f"- {what}: {where}"
    yield ""
    for chip in args.targets:
        yield f"## {label(chip)}\n"
        yield f"| {' | '.join(COLUMNS)} |"
        yield "|---" * len(COLUMNS) + "|"
        yield from (
            row(job, usage)
            for job, usage in results.items()
            if job.chip == chip and shown(job, usage, args)
        )
        yield ""
    yield "## Constants of the prediction\n"
    yield "Per clock and SM (gfx942: compute unit). -: not known. The latency is in clocks, under load.\n"
    yield "| chip | matrix FLOP | special | fp | alu | instructions | L2 bytes | L2 latency | source |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name in args.targets:
        x = CHIPS[name]
        numbers = (x.tensor, x.mufu, x.fp, x.alu, x.issue, x.l2_bytes, x.l2_latency)
        cells = " | ".join("-" if n is None else f"{n:,}" for n in numbers)
        yield f"| {label(name)} | {cells} | {x.source} |"
    yield ""


def shown(job: Job, usage: Usage, args: Args) -> bool:
    """Return whether a kernel has a row of its own."""
    head_dims = [x for x in args.head_dims if x in SHOWN] or args.head_dims
    return job.head_dim in head_dims or bool(misses_of(job, usage))


def label(chip: str) -> str:
    return chip if chip.startswith("gfx") else f"sm_{chip}"


def record(job: Job, usage: Usage) -> dict[str, Any]:
    """Everything about one kernel, for the JSON file."""
    fields = asdict(usage)
    del fields["flops"]
    for loop, prediction in zip(fields["loops"], fields.pop("predicted"), strict=True):
        del loop["names"]  # single mnemonics: too long for a file in the repository
        loop["predicted"] = prediction and {**prediction, "share": round(prediction["share"], 3)}
    return {**asdict(job), **fields, "missed": misses_of(job, usage)}


def main(args: Args) -> None:
    for option, path in (("--output", args.output), ("--json", args.json)):
        if path is not None:
            check_file(path, option)  # before minutes of compiling
    jobs = [
        Job(chip, head_dim, dtype, name)
        for chip in args.targets
        for head_dim in args.head_dims
        for dtype in args.dtypes
        for name in launches(chip, head_dim, dtype)
    ]
    with contextlib.ExitStack() as stack:
        run: Callable[..., Iterable[Usage]] = map
        if args.processes > 1:
            run = stack.enter_context(ProcessPoolExecutor(args.processes)).map
        usages = tqdm(run(compile_job, jobs), total=len(jobs), desc="compiling")
        results = dict(zip(jobs, usages, strict=True))
    text = "\n".join(markdown(results, args))
    if args.output is None:
        print(text)
    else:
        with atomic_path(args.output) as path:
            path.write_text(text)
    if args.json is not None:
        rows = ",\n".join(
            json.dumps(record(job, usage))
            for job, usage in results.items()
            if shown(job, usage, args)
        )
        head = {
            "note": "read from machine code; predicted is a model's number, not a measurement",
            "triton": triton.__version__,
            "torch": torch.__version__,
        }
        with atomic_path(args.json) as path:  # one kernel a line
            path.write_text(f'{json.dumps(head)[:-1]}, "kernels": [\n{rows}\n]}}\n')
    failures = sum(bool(misses_of(job, usage)) for job, usage in results.items())
    print(f"{len(jobs)} compiled, {failures} miss a bound", file=sys.stderr)
    if args.check and failures:
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
