"""`calling_driver`: finds the loop or the pipeline that is calling the transformer."""

import inspect
import sys
import threading
from collections.abc import Collection
from types import FrameType
from typing import Any

from torch import Tensor, nn

from dit_accel.runtime.components import TRANSFORMERS
from dit_accel.runtime.loop import SamplingLoop, same_storage

MAX_FRAMES = 64
"""Number of stack frames to search; a pipeline is a few frames above the call of its transformer."""


def calling_driver(
    transformer: nn.Module, timestep: Any, loops: Collection[SamplingLoop], *, pipelines: bool
) -> Any:
    """Return the nearest caller that drives this call: a declared loop or a pipeline.

    Several pipelines can share a transformer, and pipelines that were not enabled can call it, so the call stack is
    searched. A pipeline drives the call if `timestep` is a view of its scheduler's timesteps, or if this transformer (or
    a wrapper of it) is its `transformer`. A declared loop drives the calls of the function that declared it.

    Args:
        transformer: module that is called.
        timestep: argument `timestep` of the call.
        loops: declared loops.
        pipelines: whether to search for pipelines.

    Returns:
        A loop or a pipeline; None if no caller drives the call.
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(MAX_FRAMES):
        if frame is None:
            return None
        for loop in loops:
            if loop.frame is frame:
                return loop
        if pipelines:
            caller = _self_of(frame)
            timesteps = getattr(scheduler_of(caller), "timesteps", None)
            if isinstance(timesteps, Tensor) and (
                same_storage(timestep, timesteps) or holds(caller, transformer)
            ):
                return caller
        frame = frame.f_back
    return None


def declaring_frame() -> FrameType | None:
    """Return the frame that enters a generator-based context manager; called from the body of the generator."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_contextlib(frame):
        frame = frame.f_back
    while frame is not None and _is_contextlib(frame):
        frame = frame.f_back
    return frame


def _is_contextlib(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") == "contextlib"


def is_inside(thread: threading.Thread, transformer: nn.Module) -> bool:
    """Return whether a thread is in a call of this transformer."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if _self_of(frame) is transformer:
            return True
        frame = frame.f_back
    return False


def scheduler_of(pipe: Any) -> Any:
    """Return the attribute `scheduler` of an object; None if it cannot be read."""
    try:
        return getattr(pipe, "scheduler", None)
    except Exception:  # a property of an unrelated object
        return None


def holds(pipe: Any, transformer: nn.Module) -> bool:
    """Return whether this transformer, or a wrapper of it, is a component of the pipeline."""
    return any(_has(getattr(pipe, name, None), transformer) for name in TRANSFORMERS)


def steps_of(pipe: Any, transformer: nn.Module, timesteps: Tensor) -> tuple[int, int]:
    """Return the first step in which a pipeline calls this transformer, and the step after the last one.

    A pipeline with two transformers (Wan2.2) calls the first one while the timestep is at least `boundary_ratio`, and
    then the second one.
    """
    boundary = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
    second = getattr(pipe, TRANSFORMERS[1], None)
    if boundary is None or second is None:
        return 0, len(timesteps)
    level = boundary * pipe.scheduler.config.num_train_timesteps
    change = int((timesteps >= level).sum())
    return (change, len(timesteps)) if _has(second, transformer) else (0, change)


def _has(held: Any, transformer: nn.Module) -> bool:
    return isinstance(held, nn.Module) and (
        held is transformer or any(x is transformer for x in held.modules())
    )


def _self_of(frame: FrameType) -> Any:
    """Return the `self` of a method's frame; None for other frames."""
    if not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        return None  # a module or class body: f_locals is the namespace itself, not a copy
    variables = frame.f_locals
    caller = variables.get("self")
    if isinstance(variables, dict) and sys.gettrace() is None:
        # Before Python 3.13 the frame keeps this copy, which would keep deleted variables alive. Not done under a
        # debugger, which writes the copy back.
        variables.clear()
    return caller
