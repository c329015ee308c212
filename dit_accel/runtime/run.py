"""`Run` and `Context`: what the calls of one sampling loop share."""

import weakref
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor


class Context:
    """Calls of a run that belong together, one in each step: those with the same text (and image embeddings).

    It lives no longer than the tensors that it is known by.
    """

    def __init__(self, tensors: tuple[Any, ...], forget: Any = None) -> None:
        self._tensors = tuple(weakref.ref(x, forget) for x in tensors)
        self._versions = _versions(tensors)
        self.step = -1
        """Step of its last call."""
        self.agreed = False
        """True if all processes of context parallelism are known to make the same calls in it."""
        self.states: dict[str, Any] = {}
        """State of each method for this context, by the name of the method."""

    def is_of(self, tensors: tuple[Any, ...]) -> bool:
        """Return whether the context belongs to these very tensors, and they were not written to since."""
        return (
            len(tensors) == len(self._tensors)
            and all(ref() is x for ref, x in zip(self._tensors, tensors, strict=True))
            and _versions(tensors) == self._versions
        )


def _versions(tensors: tuple[Any, ...]) -> tuple[int, ...]:
    # Tensors made in inference mode have no counter.
    return tuple(0 if x.is_inference() else x._version for x in tensors)


def _reference(x: Any) -> Callable[[], Any]:
    """A weak reference where the object can have one."""
    try:
        return weakref.ref(x)
    except TypeError:  # None, too
        return lambda: x


class Run:
    """One pass of a scheduler over its timesteps, or the calls outside of any sampling loop.

    Attributes:
        timesteps: those of the scheduler; None outside of a sampling loop.
        begin: index of the first step that is really executed (image-to-image begins late).
        step: step of the current call, from 0; outside of a sampling loop the number of earlier calls.
        contexts: by key, see `Clock`.
        context: that of the current call; None between calls, so that it can go with its tensors.
        states: what each method keeps for this run, by the name of the method.
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
        """Index after the last step that calls this transformer; None: that of the last timestep."""
        self.begin_assumed = False
        """True if `begin` is the first position seen, because the scheduler does not tell it."""
        self.step = -1
        self.calls: dict[Hashable, int] = {}
        """Calls of the current step, less one, by what they are conditioned on."""
        self.contexts: dict[Hashable, Context] = {}
        self.context: Context = None  # type: ignore[assignment]
        self.states: dict[str, Any] = {}
        self.weights: Hashable = None
        """The transformer's weights at the last call, see `weights_state`; None before the first."""
        self.unscheduled: set[str] | None = None
        """Methods that the schedule leaves nothing to do, by name; None before the first call."""
        self.idle_checked = False
        """True once the run was checked for having accelerated anything."""
        self._scheduler = _reference(scheduler)
        self._sigmas = sigmas
        self._pipe = pipe

    @property
    def num_steps(self) -> int | None:
        """Steps from `begin` to the end; None outside of a sampling loop."""
        if self.timesteps is None:
            return None
        return (len(self.timesteps) if self.end is None else self.end) - self.begin

    def begin_at(self, index: int) -> None:
        """Correct `begin`, once it is known."""
        self.begin, self.begin_assumed = index, False

    @property
    def in_loop(self) -> bool:
        """True if a sampling loop drives the calls: the step is known."""
        return self.timesteps is not None

    @property
    def is_last_step(self) -> bool:
        """True if the current call is in the last step of a sampling loop."""
        return self.num_steps is not None and self.step >= self.num_steps - 1

    @property
    def scheduler(self) -> Any:
        """The scheduler that drives the run; None if it is gone or was never known."""
        return self._scheduler()

    @property
    def pipe(self) -> Any:
        """The pipeline that runs, while it lives; None if it is not known."""
        return None if self._pipe is None else self._pipe()

    @property
    def repeats(self) -> bool:
        """True if two steps may share a noise level (Heun and the like)."""
        return self.scheduler is None or getattr(self.scheduler, "order", 1) > 1

    def sigmas(self) -> Tensor | None:
        """Noise levels of the steps of this run, one each; None if they are not known."""
        sigmas = self._sigmas
        if sigmas is None:
            sigmas = getattr(self.scheduler, "sigmas", None)
        return None if sigmas is None else sigmas[self.begin :]

    def forget(self, name: str) -> None:
        """Drop what the method of this name keeps for the contexts."""
        for context in self.contexts.values():
            context.states.pop(name, None)
