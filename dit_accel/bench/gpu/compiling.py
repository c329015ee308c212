"""Compile launches in worker processes: into Triton's cache on a GPU, ahead of time without one."""

import multiprocessing
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as PoolTimeoutError
from typing import Any

import torch

from dit_accel.bench.gpu.device import DryDevice, first_line
from dit_accel.bench.gpu.journal import SubStep
from dit_accel.bench.gpu.recording import Sketch, without_device
from dit_accel.kernels.block_sparse.tiles import Target


def unique(sketches: Iterable[Sketch]) -> list[Sketch]:
    """Return one launch for each kernel that has to be compiled, in order."""
    return list({x.key(): x for x in reversed(list(sketches))}.values())[::-1]


def walk(sub_step: SubStep, target: Target) -> list[Sketch]:
    """Return what a sub-step launches, without a device."""
    with without_device(target) as held:
        torch.manual_seed(0)
        sub_step.run(DryDevice(), {})
    return unique(x.sketch() for x in held)


def spread(sketches: list[Sketch], limit: int | None) -> list[Sketch]:
    """Return at most `limit` launches: one of each kernel and set of constants in turn."""
    if limit is None or len(sketches) <= limit:
        return sketches
    groups: dict[str, list[Sketch]] = {}
    for x in sketches:
        groups.setdefault(x.kernel, []).append(x)
    # Steps of equal size through each group reach modes that stand far from each other.
    share = max(1, limit // len(groups))
    chosen: list[Sketch] = []
    for group in groups.values():
        chosen += group[:: max(1, -(-len(group) // share))]
    return chosen[:limit]


def compile_ahead(sketch: Sketch, target: Target) -> None:
    """Compile for a chip that is not here."""
    from dit_accel.kernels.aot import compile_launch

    compile_launch(sketch.launch(), target)


def compile_here(sketch: Sketch, target: Target) -> None:
    """Compile for the device of this machine, its launcher too; Triton's cache keeps both."""
    launch = sketch.launch()
    compiled = launch.kernel.warmup(
        grid=sketch.grid, **launch.arguments, **sketch.constants, **sketch.options
    )
    if hasattr(compiled, "_init_handles"):
        compiled._init_handles()


def compile_all(
    sketches: list[Sketch],
    target: Target,
    *,
    here: bool,
    workers: int | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Compile launches in parallel.

    Args:
        sketches: what to compile.
        target: kind of chip.
        here: for the device of this machine. Default: ahead of time.
        workers: number of processes. Default: one less than there are cores, at most 14.
        seconds: time limit; what is not compiled by then compiles at its first launch.

    Returns:
        The number of kernels, how many are compiled, the seconds, and the errors by kernel.
    """
    start = time.monotonic()
    function = compile_here if here else compile_ahead
    workers = workers or max(1, min(14, (os.cpu_count() or 2) - 1))
    errors: dict[str, str] = {}
    done = 0
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        jobs = {pool.submit(function, x, target): x for x in sketches}
        for job in as_completed(jobs, timeout=seconds):
            error = job.exception()
            if error is None:
                done += 1
            else:
                errors[label(jobs[job])] = first_line(error)
    except PoolTimeoutError:
        pass
    finally:
        _end(pool)
    return {
        "kernels": len(sketches),
        "compiled": done,
        "workers": workers,
        "compile_s": round(time.monotonic() - start, 1),
        **({"errors": errors} if errors else {}),
    }


def _end(pool: ProcessPoolExecutor) -> None:
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()


def label(sketch: Sketch) -> str:
    """Return a short name of a launch that tells it from others."""
    c = sketch.constants
    shown = ("HEAD_DIM", "LINEAR", "EXTRA_KEYS", "POSITIONAL", "TQ", "TK", "BM", "BN")
    parts = [f"{n}={c[n]}" for n in shown if n in c]
    kinds = {str(x).removeprefix("torch.") for x in sketch.arguments.values() if _is_float(x)}
    parts += [f"{n[4:]}={x}" for n, x in sketch.options.items() if n.startswith("num_")]
    return f"{sketch.kernel}({', '.join(parts)}; {'/'.join(sorted(kinds))})"


def _is_float(x: Any) -> bool:
    return isinstance(x, torch.dtype) and x.is_floating_point
