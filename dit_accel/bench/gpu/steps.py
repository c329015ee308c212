"""All sub-steps of a run in order, the most informative first."""

import functools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch

from dit_accel.bench.gpu import (
    ceilings,
    checks,
    compiling,
    lengths,
    prefill,
    profiles,
    routing,
    speed,
    sweep,
)
from dit_accel.bench.gpu.device import Device, Result, first_line
from dit_accel.bench.gpu.journal import SubStep
from dit_accel.bench.gpu.recording import Sketch
from dit_accel.kernels.block_sparse.tiles import Target

# Largest share of the remaining time for a compilation.
COMPILE_SHARE = 0.3
MOST_COMPILE_S = 150.0
COMPILATIONS = ("compile/first", "compile/rest")


def first_measurements() -> list[SubStep]:
    """Return the measurements after the first compilation."""
    return [
        *ceilings.yardsticks(),
        *routing.sub_steps(),
        *checks.sub_steps(),
        *prefill.sub_steps(),
        *speed.forwards(),
        *speed.backwards(),
    ]


def other_measurements() -> list[SubStep]:
    """Return the measurements after the second compilation."""
    return [
        *sweep.sub_steps(),
        *profiles.profiles(),
        *lengths.sub_steps(),
        *prefill.timings(),
        *profiles.memories(),
        *speed.more_forwards(),
        *profiles.flexes(),
    ]


def sub_steps(left: Callable[[], float]) -> list[SubStep]:
    """Return all sub-steps.

    Args:
        left: function that returns the remaining seconds of the budget, which limits the compilations.
    """

    def compilation(name: str, sub_steps: list[SubStep]) -> SubStep:
        def run(device: Device, found: dict[str, Result]) -> Result:
            if device.dry:
                return {}
            target = Target.of(torch.device("cuda"))
            sketches, errors = walk_all([x.id for x in sub_steps], target)
            seconds = min(MOST_COMPILE_S, max(20.0, COMPILE_SHARE * left()))
            result = compiling.compile_all(sketches, target, here=True, seconds=seconds)
            return {**result, **({"not_walked": errors} if errors else {})}

        return SubStep("compile", name.removeprefix("compile/"), run, 30.0)

    first, rest = first_measurements(), other_measurements()
    return [
        *ceilings.sub_steps(),
        compilation(COMPILATIONS[0], first),
        *first,
        compilation(COMPILATIONS[1], rest),
        *rest,
    ]


@functools.cache
def _by_id() -> dict[str, SubStep]:
    return {x.id: x for x in (*first_measurements(), *other_measurements())}


def walk_one(sub_step_id: str, target: Target) -> list[Sketch] | str:
    """Return the launches of a sub-step, or the error that prevents recording them."""
    try:
        return compiling.walk(_by_id()[sub_step_id], target)
    except Exception as error:
        return first_line(error)


def walk_all(ids: list[str], target: Target) -> tuple[list[Sketch], dict[str, str]]:
    """Return all kernels that sub-steps launch, in order, and the errors by sub-step.

    Runs in separate processes, so that meta tensors do not enter the caches of this process.
    """
    workers = max(1, min(8, (os.cpu_count() or 2)))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        walked = list(pool.map(walk_one, ids, [target] * len(ids), chunksize=4))
    errors = {name: x for name, x in zip(ids, walked, strict=True) if isinstance(x, str)}
    found = [x for sketches in walked if isinstance(sketches, list) for x in sketches]
    return compiling.unique(found), errors
