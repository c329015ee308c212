"""`Run` and `Context`: state that the calls of one sampling loop share."""

import weakref
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor


class Context:
    """State of the calls of a run that have the same conditions, one call in each step.

    A context is identified by its condition tensors (text and image embeddings), and is freed with them.
    """

    def __init__(self, tensors: tuple[Any, ...], forget: Any = None) -> None:
        self._tensors = tuple(weakref.ref(x, forget) for x in tensors)
        self._versions = _versions(tensors)
        self.step = -1
        """Step of the last call."""
        self.agreed = False
        """True if all processes of context parallelism have compared a call of this context."""
        self.states: dict[str, Any] = {}
        """State of each method for this context, by the name of the method."""

    def is_of(self, tensors: tuple[Any, ...]) -> bool:
        """Return whether the context belongs to these tensor objects, and nothing was written to them since."""
        return (
            len(tensors) == len(self._tensors)
            and all(ref() is x for ref, x in zip(self._tensors, tensors, strict=True))
            and _versions(tensors) == self._versions
        )


def _versions(tensors: tuple[Any, ...]) -> tuple[int, ...]:
    # Tensors made in inference mode have no version counter.
    return tuple(0 if x.is_inference() else x._version for x in tensors)


def _reference(x: Any) -> Callable[[], Any]:
    """Return a weak reference, or a strong one if the object does not support weak references."""
    try:
        return weakref.ref(x)
    except TypeError:  # None, too
        return lambda: x


class Run:
    """State of one pass of a scheduler over its timesteps, or of the calls outside of any sampling loop.

    Attributes:
        timesteps: timesteps of the scheduler; None outside of a sampling loop.
        begin: index of the first executed step; larger than 0 for image-to-image.
        step: step of the current call, from 0. Outside of a sampling loop: number of earlier calls.
        contexts: contexts by key, see `Clock`.
        context: context of the current call; None between calls, so that it can be freed with its tensors.
        states: state of each method for this run, by the name of the method.
    """

    def __init__(
        self,
        timesteps: Tensor | None = None,
        *,
        scheduler: Any = None,
        sigmas: Tensor | None = None,
        begin: int = 0,
        pipe: weakref.ref | None = None,
    ) -> None:
        self.timesteps = timesteps
        self.begin = begin
        self.end: int | None = None
        """Index after the last step that calls this transformer; None: the number of timesteps."""
        self.begin_assumed = False
        """True if `begin` is the index of the first call, because the scheduler has no `begin_index`."""
        self.step = -1
        self.calls: dict[Hashable, int] = {}
        """Number of calls of the current step minus one, by their conditions."""
        self.contexts: dict[Hashable, Context] = {}
        self.context: Context = None  # type: ignore[assignment]
        self.states: dict[str, Any] = {}
        self.weights: Hashable = None
        """State of the transformer's weights at the last call, see `weights_state`; None before the first call."""
        self.unscheduled: set[str] | None = None
        """Names of the methods that the schedule leaves nothing to do; None before the first call."""
        self.idle_checked = False
        """True once the run was checked for having accelerated anything."""
        self._scheduler = _reference(scheduler)
        self._sigmas = sigmas
        self._pipe = pipe

    @property
    def num_steps(self) -> int | None:
        """Number of steps from `begin` to the end; None outside of a sampling loop."""
        if self.timesteps is None:
            return None
        return (len(self.timesteps) if self.end is None else self.end) - self.begin

    def begin_at(self, index: int) -> None:
        """Set `begin` to a known index."""
        self.begin, self.begin_assumed = index, False

    @property
    def in_loop(self) -> bool:
        """True if a sampling loop drives the calls, so that the step is known."""
        return self.timesteps is not None

    @property
    def is_last_step(self) -> bool:
        """True if the current call is in the last step of a sampling loop."""
        return self.num_steps is not None and self.step >= self.num_steps - 1

    @property
    def scheduler(self) -> Any:
        """Scheduler that drives the run; None if it was deleted or is not known."""
        return self._scheduler()

    @property
    def pipe(self) -> Any:
        """Pipeline that runs; None if it was deleted or is not known."""
        return None if self._pipe is None else self._pipe()

    @property
    def repeats(self) -> bool:
        """True if two steps may have the same noise level, as with the Heun scheduler."""
        return self.scheduler is None or getattr(self.scheduler, "order", 1) > 1

    def sigmas(self) -> Tensor | None:
        """Return the noise level of each step of this run; None if the levels are not known."""
        sigmas = self._sigmas
        if sigmas is None:
            sigmas = getattr(self.scheduler, "sigmas", None)
        return None if sigmas is None else sigmas[self.begin :]

    def forget(self, name: str) -> None:
        """Drop the state of this method in all contexts."""
        for context in self.contexts.values():
            context.states.pop(name, None)
