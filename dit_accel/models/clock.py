"""`Clock`: which run, step and context a transformer call belongs to, read from what is there."""

import weakref
from typing import Any

from torch import nn


class Clock:
    """Counts the transformer calls of a pipeline.

    A run is the identity of `pipe.scheduler.timesteps`; a context is the identity of
    `encoder_hidden_states` (the two halves of classifier-free guidance); a step is the number of
    earlier calls of that context in this run. Nothing is guessed from timestep values: some models
    count them upwards, some solvers repeat them.
    """

    def __init__(self, pipe: Any) -> None:
        # Weak: the pipeline owns the transformer, which owns this clock.
        self._pipe = weakref.ref(pipe)
        self._scheduler = pipe.scheduler
        self._timesteps: Any = None
        self._calls: dict[int, tuple[Any, int]] = {}
        self.step = 0
        self.num_steps = 0

    def tick(self, module: nn.Module, context: Any) -> bool:
        """Note one call with this context; True if it begins a new run."""
        pipe = self._pipe()
        if pipe is not None and pipe.transformer is module:  # else: a copy, or a shared transformer
            self._scheduler = pipe.scheduler
        timesteps = self._scheduler.timesteps
        new_run = timesteps is not self._timesteps
        if new_run:
            self._timesteps = timesteps
            self._calls = {}
            self.step = 0
            self.num_steps = len(timesteps)
        # The context object is kept beside its count, so its id cannot be taken by another one.
        _, self.step = self._calls.get(id(context), (context, self.step))
        self._calls[id(context)] = (context, self.step + 1)
        return new_run
