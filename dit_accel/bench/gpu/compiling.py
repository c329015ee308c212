"""Compilation of launches in worker processes: into Triton's cache on a GPU, or ahead of time without a GPU."""

import hashlib
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from dit_accel.bench.gpu.device import DryDevice, first_line
from dit_accel.bench.gpu.journal import SubStep
from dit_accel.bench.gpu.recording import Sketch, without_device
from dit_accel.kernels.block_sparse.tiles import Target


def unique(sketches: Iterable[Sketch]) -> list[Sketch]:
    """Return one launch for each different compiled kernel, in order."""
    return list({x.key(): x for x in reversed(list(sketches))}.values())[::-1]


def walk(sub_step: SubStep, target: Target) -> list[Sketch]:
    """Return the launches of a sub-step, recorded without a device."""
    with without_device(target) as held:
        torch.manual_seed(0)
        sub_step.run(DryDevice(), {})
    return unique(x.sketch() for x in held)


def spread(sketches: list[Sketch], limit: int | None) -> list[Sketch]:
    """Return at most `limit` launches, spread over kernels and sets of constants."""
    if limit is None or len(sketches) <= limit:
        return sketches
    groups: dict[str, list[Sketch]] = {}
    for x in sketches:
        groups.setdefault(x.kernel, []).append(x)
    # Equal strides through each group cover modes that are far apart in the list.
    share = max(1, limit // len(groups))
    chosen: list[Sketch] = []
    for group in groups.values():
        chosen += group[:: max(1, -(-len(group) // share))]
    return chosen[:limit]


def compile_ahead(sketch: Sketch, target: Target) -> None:
    """Compile a launch for a chip that need not be present."""
    from dit_accel.kernels.aot import compile_launch

    compile_launch(sketch.launch(), target)


def compile_here(sketch: Sketch, target: Target) -> None:
    """Compile a launch and its launcher for the device of this machine, into Triton's cache."""
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
    seconds: float = math.inf,
) -> dict[str, Any]:
    """Compile launches in parallel.

    On some inputs Triton's compiler ends its process. In that case only one launch is lost.

    Args:
        sketches: launches to compile.
        target: kind of chip.
        here: compile for the device of this machine. Default: ahead of time.
        workers: number of processes. Default: the number of cores minus one, at most 14.
        seconds: time limit. Remaining kernels are compiled at their first launch.

    Returns:
        The number of kernels, the number of compiled ones, the seconds, and under "not_compiled" the errors by label.
    """
    start = time.monotonic()
    function = compile_here if here else compile_ahead
    count = workers or max(1, min(14, (os.cpu_count() or 2) - 1))
    errors: dict[str, str] = {}
    left, done = list(reversed(sketches)), 0
    busy: dict[Connection, tuple[Worker, Sketch]] = {}
    idle = [Worker(function, target) for _ in range(min(count, len(sketches)))]
    try:
        while (left or busy) and time.monotonic() - start < seconds:
            while left and (idle or len(busy) < count):
                worker = idle.pop() if idle else Worker(function, target)
                sketch = left.pop()
                worker.connection.send(sketch)
                busy[worker.connection] = worker, sketch
            for connection in wait(list(busy), timeout=min(1.0, seconds)):
                assert isinstance(connection, Connection)
                worker, sketch = busy.pop(connection)
                try:
                    error = connection.recv()
                    idle.append(worker)
                except EOFError:
                    error = "the compiler ended its process"
                if error is None:
                    done += 1
                else:
                    errors[label(sketch)] = error
    finally:
        for worker in (*idle, *(x for x, _ in busy.values())):
            worker.process.terminate()
    return {
        "kernels": len(sketches),
        "compiled": done,
        "workers": count,
        "compile_s": round(time.monotonic() - start, 1),
        **({"not_compiled": errors} if errors else {}),
    }


class Worker:
    """A process that compiles the launches sent to it, and answers with None or an error."""

    def __init__(self, function: Callable[[Sketch, Target], None], target: Target) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, function, target), daemon=True)
        self.process.start()
        other.close()


def _serve(
    connection: Connection, function: Callable[[Sketch, Target], None], target: Target
) -> None:
    # A failing compiler prints the whole kernel. The exception has the relevant part.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    while True:
        try:
            sketch = connection.recv()
        except EOFError:
            return
        error = None
        try:
            function(sketch, target)
        except Exception as caught:
            error = first_line(caught)
        connection.send(error)


def label(sketch: Sketch) -> str:
    """Return a short, unique name of a launch."""
    c = sketch.constants
    shown = ("HEAD_DIM", "LINEAR", "EXTRA_KEYS", "POSITIONAL", "TQ", "TK", "BM", "BN")
    parts = [f"{n}={c[n]}" for n in shown if n in c]
    kinds = {str(x).removeprefix("torch.") for x in sketch.arguments.values() if _is_float(x)}
    parts += [f"{n[4:]}={x}" for n, x in sketch.options.items() if n.startswith("num_")]
    digest = hashlib.sha256(repr(sketch.key()).encode()).hexdigest()[:6]
    return f"{sketch.kernel}({', '.join(parts)}; {'/'.join(sorted(kinds))}) {digest}"


def _is_float(x: Any) -> bool:
    return isinstance(x, torch.dtype) and x.is_floating_point
