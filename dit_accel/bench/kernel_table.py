"""Table of the resources of every kernel on every chip, compiled ahead of time (kernels/kernel_table.py)."""

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

import torch
import triton
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
# head_dims in the table. Others are compiled and checked, and appear if they miss a bound; 72 and 96 have the tiles of 128.
SHOWN = (64, 128)


@dataclass
class KernelTable:
    """Resources of every kernel, in every mode and for every chip, as a Markdown table and a JSON file."""

    targets: tuple[Name, ...] = ("80", "89", "90", "100", "120", "gfx942")
    head_dims: tuple[int, ...] = (64, 72, 96, 128, 256)
    dtypes: tuple[Literal["fp16", "bf16"], ...] = ("bf16",)
    """Dtypes. fp16 compiles to the same code except for conversions; no bound has differed."""
    output: Path | None = None
    """Markdown file. Default: print only."""
    json: Path | None = None
    """JSON file with all data, by loop. Default: none."""
    check: bool = False
    """Exit with 1 if a bound is missed."""
    processes: int = os.cpu_count() or 1
    """Number of compiling processes. 1: compile in this process."""

    def run(self) -> None:
        """Compile, write or print the table, and write the JSON file.

        Raises:
            ValueError: a file cannot be written.
            SystemExit: `check` is set and a bound is missed; exit status 1.
        """
        for option, path in (("--output", self.output), ("--json", self.json)):
            if path is not None:
                check_file(path, option)  # before compiling, which takes minutes
        jobs = [
            Job(chip, head_dim, dtype, name)
            for chip in self.targets
            for head_dim in self.head_dims
            for dtype in self.dtypes
            for name in launches(chip, head_dim, dtype)
        ]
        with contextlib.ExitStack() as stack:
            run: Callable[..., Iterable[Usage]] = map
            if self.processes > 1:
                run = stack.enter_context(ProcessPoolExecutor(self.processes)).map
            usages = tqdm(run(compile_job, jobs), total=len(jobs), desc="compiling")
            results = dict(zip(jobs, usages, strict=True))
        text = "\n".join(markdown(results, self))
        if self.output is None:
            print(text)
        else:
            with atomic_path(self.output) as path:
                path.write_text(text)
        if self.json is not None:
            rows = ",\n".join(
                json.dumps(record(job, usage))
                for job, usage in results.items()
                if shown(job, usage, self)
            )
            head = {
                "note": "from machine code; predicted is the result of a model, not a measurement",
                "triton": triton.__version__,
                "torch": torch.__version__,
            }
            with atomic_path(self.json) as path:  # one line per kernel
                path.write_text(f'{json.dumps(head)[:-1]}, "kernels": [\n{rows}\n]}}\n')
        failures = sum(bool(misses_of(job, usage)) for job, usage in results.items())
        print(f"{len(jobs)} compiled, {failures} miss a bound", file=sys.stderr)
        if self.check and failures:
            sys.exit(1)


@dataclass(frozen=True)
class Job:
    """Kernel in one mode for one chip."""

    chip: str
    head_dim: int
    dtype: str
    name: str


def target_of(chip: str) -> Target:
    return Target("hip" if chip.startswith("gfx") else "cuda", chip)


@functools.cache
def launches(chip: str, head_dim: int, dtype: str) -> dict[str, Launch]:
    """Return every launch of a chip, cached because building them takes as long as one compilation."""
    return catalogue(target_of(chip), head_dim, DTYPES[dtype])


def compile_job(job: Job) -> Usage:
    """Compile one kernel."""
    launch = launches(job.chip, job.head_dim, job.dtype)[job.name]
    try:
        return compile_launch(launch, target_of(job.chip))
    except Exception as error:
        raise RuntimeError(f"{job}: does not compile: {error}") from error


def misses_of(job: Job, usage: Usage) -> list[str]:
    return missed(job.chip, job.head_dim, usage)


def row(job: Job, usage: Usage) -> str:
    """Return a line of a chip's table. Values of several loops are separated by slashes."""

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


HEAD = """# Resources of the kernels

Written by `make kernel-table`: every kernel in every mode with different code, compiled ahead of time with triton
{triton}, for blocks of 64 and 16,384 tokens. The table shows registers, memory and instructions. **No number is a
measurement on a chip**: the last column is the prediction of a model (`dit_accel/kernels/predicted.py`).

- d: head_dim and dtype. tile: queries (TQ), keys (TK), tokens (TL), value channels (TV). regs: registers per thread.
  spills, stack: bytes of spill stores and of local memory per thread. shared: KiB per program (limits: {limits}).
  per SM: programs that fit at a time.
- The other columns describe main loops, the innermost loops with matrix instructions, in the order of the code,
  separated by slashes. For the forward kernel: full blocks, partial blocks, then extra keys or blocks.
- wait: the smallest number of groups of asynchronous copies that may be in flight when a step waits for its data. 0: no
  load overlaps with arithmetic. mbarrier: bulk copies. -: no asynchronous copies (gfx942 has none).
- instr, matrix, special (exp2 and similar), fp, int: instructions of a warp in one step.
- predicted: share of the matrix units' throughput in percent, by a model of one step. `<=`: an upper bound, because the
  latencies of the chip are unknown. -: no number, because the kernel has no loop or does not fit.

With head_dim 256, the linear branch runs outside the kernels. The table shows head_dim 64 and 128; other head_dims appear
if they miss a bound. Compiled for this table: head_dim {head_dims}. All data by loop: `{json}`.
"""
BOUNDS = """Bounds: no spills up to head_dim 128 on sm_80, sm_90 and sm_100, at most 128 B elsewhere; shared memory within the
limit; in main loops the matrix instruction of the chip and, with more than one stage, no `async_wait` 0 and only
asynchronous loads. gfx942 is exempt from the last bound, because it loads into registers. Rare loops are not exempt.
On sm_80, sm_90 and sm_100, spills in a main loop are listed separately: outside of loops a program pays for them once.
"""
COLUMNS = (
    "kernel / mode", "d", "tile", "warps, stages", "regs", "spills, stack", "shared", "per SM", "wait", "instr",
    "matrix", "special", "fp", "int", "predicted",
)  # fmt: skip


def markdown(results: dict[Job, Usage], table: KernelTable) -> Iterable[str]:
    """Yield the lines of the table."""
    limits = ", ".join(f"{label(name)} {CHIPS[name].shared_kib}" for name in table.targets)
    yield HEAD.format(
        triton=triton.__version__,
        limits=limits,
        head_dims=", ".join(map(str, table.head_dims)),
        json=table.json or "--json",
    )
    misses: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for job, usage in results.items():
        for what in misses_of(job, usage):
            at = str(job.head_dim) if len(table.dtypes) == 1 else f"{job.head_dim} {job.dtype}"
            misses[f"{label(job.chip)}, {what}"][job.name].append(at)
    yield f"## Bounds missed: {sum(len(x) for x in misses.values())}\n"
    yield BOUNDS
    for what, names in misses.items():
        where = "; ".join(f"{name} ({', '.join(at)})" for name, at in names.items())
        yield f"- {what}: {where}"
    yield ""
    for chip in table.targets:
        yield f"## {label(chip)}\n"
        yield f"| {' | '.join(COLUMNS)} |"
        yield "|---" * len(COLUMNS) + "|"
        yield from (
            row(job, usage)
            for job, usage in results.items()
            if job.chip == chip and shown(job, usage, table)
        )
        yield ""
    yield "## Constants of the prediction\n"
    yield "Per clock and SM (gfx942: compute unit). -: unknown. The latency is in clocks, under load.\n"
    yield "| chip | matrix FLOP | special | fp | alu | instructions | L2 bytes | L2 latency | source |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name in table.targets:
        x = CHIPS[name]
        numbers = (x.tensor, x.mufu, x.fp, x.alu, x.issue, x.l2_bytes, x.l2_latency)
        cells = " | ".join("-" if n is None else f"{n:,}" for n in numbers)
        yield f"| {label(name)} | {cells} | {x.source} |"
    yield ""


def shown(job: Job, usage: Usage, table: KernelTable) -> bool:
    """Return whether the table has a row for a kernel."""
    head_dims = [x for x in table.head_dims if x in SHOWN] or table.head_dims
    return job.head_dim in head_dims or bool(misses_of(job, usage))


def label(chip: str) -> str:
    return chip if chip.startswith("gfx") else f"sm_{chip}"


def record(job: Job, usage: Usage) -> dict[str, Any]:
    """Return the entry of a kernel in the JSON file."""
    fields = asdict(usage)
    del fields["flops"]
    for loop, prediction in zip(fields["loops"], fields.pop("predicted"), strict=True):
        del loop["names"]  # counts of single mnemonics are too long for a file in the repository
        loop["predicted"] = prediction and {**prediction, "share": round(prediction["share"], 3)}
    return {**asdict(job), **fields, "missed": misses_of(job, usage)}
