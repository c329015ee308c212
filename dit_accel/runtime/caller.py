"""`calling_pipeline`: finds the pipeline whose loop is calling the transformer."""

import inspect
import sys
from types import FrameType
from typing import Any

from torch import Tensor, nn

from dit_accel.runtime.loop import same_storage

MAX_FRAMES = 64
"""Frames to look at: a pipeline's loop is a handful above the call of its transformer."""


def calling_pipeline(transformer: nn.Module, timestep: Any) -> tuple[Any, Any] | None:
    """The nearest caller that has a scheduler and drives this call.

    A transformer does not know the pipelines that share it, and a pipeline that was never enabled is known
    only by its loop. A caller drives the call if `timestep` is a view of its scheduler's timesteps, or if
    this transformer (or a wrapper of it) is its `transformer`.

    Returns:
        (pipeline, scheduler), or None if no caller is a pipeline.
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(MAX_FRAMES):
        if frame is None:
            return None
        caller = _self_of(frame)
        scheduler = getattr(caller, "scheduler", None)
        if isinstance(timesteps := getattr(scheduler, "timesteps", None), Tensor) and (
            same_storage(timestep, timesteps) or holds(caller, transformer)
        ):
            return caller, scheduler
        frame = frame.f_back
    return None


def _self_of(frame: FrameType) -> Any:
    """The `self` of a method's frame; None for other frames."""
    if not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        return None  # a module or class body, whose variables are no copy
    variables = frame.f_locals
    caller = variables.get("self")
    if isinstance(variables, dict):
        # Before Python 3.13 the frame keeps this copy, and so would keep what its function deletes.
        variables.clear()
    return caller


def holds(pipe: Any, transformer: nn.Module) -> bool:
    """Whether the `transformer` of this pipeline is this one, or a wrapper of it."""
    held = getattr(pipe, "transformer", None)
    return isinstance(held, nn.Module) and (
        held is transformer or any(x is transformer for x in held.modules())
    )
