"""`SamplingLoop`: a declared sampling loop; `index_in`: the index of a `timestep` in the timesteps."""

import inspect
import threading
from types import FrameType
from typing import Any

from torch import Tensor


class SamplingLoop:
    """A declared sampling loop. Set `step` if the transformer's `timestep` is not a view of `timesteps`.

    Attributes:
        scheduler: diffusers scheduler of the loop; None if it has none.
        timesteps: `[steps]`, timesteps of the loop.
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
        """Frame of the function that declared the loop, while it runs. Calls from this function belong to the loop."""
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
        """True if a generator declared the loop, so that it may be suspended and resumed later."""
        flags = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
        return self.frame is not None and bool(self.frame.f_code.co_flags & flags)

    @property
    def timesteps(self) -> Tensor | None:
        """Present timesteps of the loop."""
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
    """Return the index in `timesteps` of the first element of `view`; None if it lies outside. No value is read."""
    offset = int(view.storage_offset()) - int(timesteps.storage_offset())
    index, rest = divmod(offset, max(timesteps.stride(0), 1))
    return index if rest == 0 and 0 <= index < len(timesteps) else None
