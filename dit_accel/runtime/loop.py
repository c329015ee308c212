"""`SamplingLoop`: a declared sampling loop; and how a `timestep` tells its place in the timesteps."""

import inspect
import threading
from types import FrameType
from typing import Any

from torch import Tensor


class SamplingLoop:
    """A declared sampling loop. Set `step` where the transformer's `timestep` is not a view of `timesteps`.

    Attributes:
        scheduler: the diffusers scheduler of the loop, or None.
        timesteps: `[steps]`, of a loop without a scheduler.
        sigmas: `[steps]` or `[steps + 1]`, noise levels of a loop without a scheduler.
    """

    def __init__(
        self,
        scheduler: Any = None,
        *,
        timesteps: Any = None,
        sigmas: Any = None,
    ) -> None:
        if (scheduler is None) == (timesteps is None):
            raise ValueError(
                f"scheduler={scheduler!r}, timesteps={timesteps!r}: pass either a scheduler or timesteps (with sigmas)"
            )
        if scheduler is not None and not hasattr(scheduler, "timesteps"):
            raise ValueError(
                f"scheduler={scheduler!r}: {type(scheduler).__name__} has no timesteps; accepted is a diffusers scheduler"
            )
        for name, x in (("timesteps", timesteps), ("sigmas", sigmas)):
            if x is not None and (not isinstance(x, Tensor) or x.ndim != 1 or len(x) < 1):
                raise ValueError(f"{name}={x!r}: accepted is a tensor of shape [steps]")
        if timesteps is not None and sigmas is not None and len(sigmas) < len(timesteps):
            raise ValueError(
                f"sigmas: {len(sigmas)} values for {len(timesteps)} timesteps; accepted is at least one for each"
            )
        self.scheduler = scheduler
        self._timesteps = timesteps
        self.sigmas = sigmas
        self._step: int | None = None
        self.frame: FrameType | None = None
        """The function that declared the loop, while it runs: it drives the calls made from there."""
        self.thread = threading.current_thread()

    @property
    def step(self) -> int | None:
        """Index of the current step; None: read from the scheduler or from `timestep`."""
        return self._step

    @step.setter
    def step(self, index: Any) -> None:
        steps = 0 if self.timesteps is None else len(self.timesteps)
        is_index = isinstance(index, int) and not isinstance(index, bool) and 0 <= index < steps
        if index is not None and not is_index:
            raise ValueError(f"step={index!r}: accepted is None or an index in [0, {steps})")
        self._step = index

    @property
    def is_suspended(self) -> bool:
        """True if a generator declared the loop: it may be suspended and resumed later."""
        flags = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
        return self.frame is not None and bool(self.frame.f_code.co_flags & flags)

    @property
    def timesteps(self) -> Tensor | None:
        """The timesteps of the loop, as they are now."""
        return self._timesteps if self.scheduler is None else self.scheduler.timesteps


def same_storage(view: Any, base: Tensor) -> bool:
    """Return whether `view` is a view of the tensor `base` (they share memory)."""
    return (
        isinstance(view, Tensor)
        and view.device == base.device
        and view.dtype == base.dtype
        and base.numel() > 0
        and view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
    )


def index_in(view: Tensor, timesteps: Tensor) -> int | None:
    """Index of the element of `timesteps` that `view` begins at; None if it lies outside. Reads no value."""
    offset = int(view.storage_offset()) - int(timesteps.storage_offset())
    index, rest = divmod(offset, max(timesteps.stride(0), 1))
    return index if rest == 0 and 0 <= index < len(timesteps) else None
