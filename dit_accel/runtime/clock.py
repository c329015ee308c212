"""`Clock`: which run, step and context a transformer call belongs to, read from what is there."""

import weakref
from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn


class Context:
    """One `encoder_hidden_states` of a run. It lives no longer than that tensor."""

    def __init__(self, ref: weakref.ref, first_step: int) -> None:
        self.ref = ref
        self.next_step = first_step
        self.state: Any = None
        """What an acceleration keeps for this context."""


class Clock:
    """Counts the transformer calls of a pipeline.

    A run is the identity of `pipe.scheduler.timesteps`; a context is the identity of
    `encoder_hidden_states` (the two halves of classifier-free guidance) and of what else `variant`
    says about a call; a step is the position of the scheduler once it has begun to step, before that
    the number of earlier calls of that context. Nothing is guessed from timestep values: some models
    count them upwards, some solvers repeat them.
    """

    def __init__(self, pipe: Any) -> None:
        # Weak: the pipeline owns the transformer, which owns this clock.
        self._pipe = weakref.ref(pipe)
        self._scheduler = pipe.scheduler
        self._timesteps: Any = None
        self._begin: int | None = None
        self._seen_before_stepping = False
        self.contexts: dict[Hashable, Context] = {}
        self._current: Hashable = None
        self.step = 0
        self.num_steps = 0

    @property
    def pipe(self) -> Any:
        """The pipeline, while it lives."""
        return self._pipe()

    @property
    def context(self) -> Context:
        """That of the current call."""
        return self.contexts[self._current]

    def tick(self, module: nn.Module, tensor: Any, variant: Hashable = None) -> bool:
        """Note one call with this context; True if it begins a new run."""
        pipe = self._pipe()
        if pipe is not None and pipe.transformer is module:  # else: a copy, or a shared transformer
            self._scheduler = pipe.scheduler
        timesteps = self._scheduler.timesteps
        new_run = timesteps is not self._timesteps
        if new_run:
            self._timesteps = timesteps
            self.contexts.clear()
            self.step = 0
            self._begin = getattr(self._scheduler, "begin_index", None)
            self._seen_before_stepping = False
        context = self._context(tensor, variant)
        self.step = self._position(context.next_step)
        context.next_step = self.step + 1
        self.num_steps = len(timesteps) - (self._begin or 0)
        return new_run

    def _context(self, tensor: Any, variant: Hashable) -> Context:
        key = self._current = (id(tensor), variant)
        context = self.contexts.get(key)
        if context is None or context.ref() is not tensor:
            contexts = self.contexts

            def forget(_: Any) -> None:
                contexts.pop(key, None)

            # A context that appears in mid-run belongs to the step in progress. With its tensor goes
            # all that an acceleration has cached for it, also after an interrupt.
            context = contexts[key] = Context(weakref.ref(tensor, forget), self.step)
        return context

    def _position(self, counted: int) -> int:
        """The scheduler's own step, where it has begun to step; else the counted one."""
        index = getattr(self._scheduler, "step_index", None)
        if index is None:
            self._seen_before_stepping = True
            return counted
        if self._begin is None:  # a pipeline that did not say where it begins
            self._begin = index - (1 if self._seen_before_stepping else 0)
        return index - self._begin

    def sigmas(self) -> Tensor | None:
        """Noise levels of the steps of this run, one each; None if the scheduler has none."""
        sigmas = getattr(self._scheduler, "sigmas", None)
        return None if sigmas is None else sigmas[self._begin or 0 :]

    @property
    def scheduler(self) -> Any:
        """The one whose steps are counted."""
        return self._scheduler

    @property
    def repeats(self) -> bool:
        """Whether two steps may share a noise level (Heun and the like)."""
        return getattr(self._scheduler, "order", 1) > 1
