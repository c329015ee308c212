"""`Clock`: finds the run, the step and the context of each transformer call, without a device sync."""

import contextlib
import copy
import threading
import weakref
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.runtime.caller import calling_driver, holds, steps_of
from dit_accel.runtime.loop import SamplingLoop, index_in, same_storage
from dit_accel.runtime.run import Context, Run

MOST_CALLS = 8
"""Most calls with the same conditions in one step. Guidance makes up to four; more calls come from a loop whose step is
not known, and no context is kept for them."""


@dataclass
class Position:
    """Position of a call in a sampling loop."""

    driver: Any
    """A scheduler, or a declared loop."""
    timesteps: Tensor
    index: int
    """Index of the step in `timesteps`."""
    counted: bool = False
    """True if the index comes from the step counter of the driver."""
    pipe: weakref.ref | None = None
    """Pipeline that runs; None if it is not known."""

    @property
    def scheduler(self) -> Any:
        """Scheduler of the driver; None for a loop without one."""
        return self.driver.scheduler if isinstance(self.driver, SamplingLoop) else self.driver


class Clock:
    """Run, step and context of the calls of one transformer.

    The driver of a call is the first of these that exists:

    1. a known scheduler whose `timesteps` the argument `timestep` is a view of. The two share storage, and the offset
       is the step. Known are the schedulers of enabled pipelines, of pipelines that called before, and of declared loops;
    2. the nearest caller that is a pipeline or declared a loop (`sampling_loop`);
    3. the scheduler of the enabled pipeline.

    A scheduler of a pipeline drives calls only after `set_timesteps`, up to its last step, and with gradients off.
    A call without a driver is outside of any sampling loop.

    A run is one pass of a scheduler over its timesteps. New timesteps or a step backwards begin a new run. A context is
    identified by the tensors on which a call is conditioned, by `Call.variant`, and by the number of earlier calls with
    them in the same step.
    """

    def __init__(self) -> None:
        self.loops: list[SamplingLoop] = []
        self._known: dict[int, weakref.ref] = {}
        """Schedulers by id."""
        self._pipe: weakref.ref | None = None
        self._runs: dict[int, Run] = {}
        """Runs by the id of their driver."""
        self.run: Run | None = None
        """Run of the current or last call."""

    def __deepcopy__(self, memo: dict) -> "Clock":
        clock = type(self)()
        for scheduler in self._schedulers():
            clock._know(copy.deepcopy(scheduler, memo))
        pipe = None if self._pipe is None else memo.get(id(self._pipe()))
        clock._pipe = None if pipe is None else weakref.ref(pipe)
        return clock

    def follow(self, pipe: Any) -> None:
        """Add the scheduler of this pipeline to the known schedulers."""
        self._pipe = _weak(pipe)
        self._know(pipe.scheduler)

    def _know(self, scheduler: Any) -> None:
        key = id(scheduler)
        if key in self._known:
            return
        known, runs = self._known, self._runs

        def forget(_: Any) -> None:
            known.pop(key, None)
            _close(runs, key)

        # A dict by id and not a WeakSet, because a scheduler may not be hashable.
        reference = _weak(scheduler, forget)
        if reference is not None:
            known[key] = reference

    def _schedulers(self) -> list[Any]:
        return [x for ref in list(self._known.values()) if (x := ref()) is not None]

    def forget(self) -> None:
        """End all runs, so that the next call begins a new one."""
        self.run = None
        for key in list(self._runs):
            _close(self._runs, key)

    @contextlib.contextmanager
    def declare(self, loop: SamplingLoop) -> Iterator[None]:
        """Context manager whose calls belong to this loop."""
        self.loops.append(loop)
        try:
            yield
        finally:
            self.loops.remove(loop)
            _close(self._runs, id(loop))

    def tick(
        self,
        transformer: nn.Module,
        timestep: Any,
        tensors: tuple[Any, ...] = (),
        variant: Hashable = None,
    ) -> bool:
        """Record a call and set `run`, its step and its context.

        Args:
            transformer: module that is called.
            timestep: argument `timestep` of the call.
            tensors: tensors on which the call is conditioned, such as text embeddings.
            variant: see `Call.variant`.

        Returns:
            True if the call begins a new run.
        """
        position = self._position(transformer, timestep)
        if position is None:
            run, step, new = self._outside_of_loops()
        else:
            run, step, new = self._in_loop(position, transformer)
        if step != run.step:
            run.calls.clear()
        self.run, run.step = run, step
        _enter_context(run, tensors, variant)
        return new

    def _position(self, transformer: nn.Module, timestep: Any) -> Position | None:
        pipe = None if self._pipe is None else self._pipe()
        if pipe is not None and not holds(pipe, transformer):
            pipe = None
        if pipe is not None:
            self._know(pipe.scheduler)  # the pipeline may have a new scheduler
        if found := _by_storage([*self.loops, *self._schedulers()], timestep):
            if pipe is not None and pipe.scheduler is found.driver:
                found.pipe = self._pipe
            return found
        moving = not torch.is_grad_enabled()  # with gradients on, the call is training
        if moving or self.loops:
            caller = calling_driver(transformer, timestep, self.loops, pipelines=moving)
            if caller is None:
                caller = self._loop_of_this_thread()
            if isinstance(caller, SamplingLoop):
                if caller.scheduler is None and caller.step is None:
                    raise ValueError(
                        "timestep: not a view of the timesteps of this sampling_loop, and loop.step=None; accepted is "
                        "timesteps[i], or loop.step set to the index of the step"
                    )
                return _by_count(caller)
            if caller is not None:
                pipe = caller
        if pipe is None or not moving:
            return None
        self._know(pipe.scheduler)
        found = _by_storage([pipe.scheduler], timestep) or _by_count(pipe.scheduler)
        if found is not None:
            found.pipe = _weak(pipe)
        return found

    def _caller(self, position: Position, transformer: nn.Module) -> weakref.ref | None:
        """Return the pipeline that calls this transformer in a loop over its own scheduler; None if there is none."""
        if isinstance(position.driver, SamplingLoop):
            return None
        pipe = calling_driver(transformer, None, (), pipelines=True)
        return _weak(pipe) if getattr(pipe, "scheduler", None) is position.driver else None

    def _loop_of_this_thread(self) -> SamplingLoop | None:
        """Return the last loop that this thread declared; None if a suspended generator declared it."""
        mine = [x for x in self.loops if x.thread is threading.current_thread()]
        return mine[-1] if mine and not mine[-1].is_suspended else None

    def _outside_of_loops(self) -> tuple[Run, int, bool]:
        if self.run is not None and not self.run.in_loop:
            return self.run, self.run.step + 1, False
        return Run(), 0, True

    def _in_loop(self, position: Position, transformer: nn.Module) -> tuple[Run, int, bool]:
        index, run = position.index, self._runs.get(id(position.driver))
        same = run is not None and run.timesteps is position.timesteps
        if run is not None and same and index >= run.begin + run.step:
            if run.begin_assumed and run.step == 0 and index > run.begin:
                run.begin_at(
                    index - 1
                )  # the first step shows where a scheduler without begin_index began
            return run, index - run.begin, False
        _close(self._runs, id(position.driver))
        scheduler = position.scheduler
        told = getattr(scheduler, "begin_index", None)
        begin = index if told is None or told > index else told
        run = self._runs[id(position.driver)] = Run(
            position.timesteps,
            scheduler=scheduler,
            sigmas=getattr(position.driver, "sigmas", None) if scheduler is None else None,
            begin=begin,
            pipe=position.pipe or self._caller(position, transformer),
        )
        if (pipe := run.pipe) is not None:
            first, end = steps_of(pipe, transformer, position.timesteps)
            if first <= index < end:  # otherwise the pipeline switches transformers in another way
                run.begin, run.end = max(begin, first), end
        run.begin_assumed = position.counted and told is None
        return run, index - run.begin, True


def _close(runs: dict[int, Run], key: int) -> None:
    """Remove a run. Its contexts form a reference cycle, so they are cleared explicitly."""
    run = runs.pop(key, None)
    if run is not None:
        run.contexts.clear()


def _weak(x: Any, forget: Any = None) -> weakref.ref | None:
    """Return a weak reference; None if the object does not support one."""
    try:
        return weakref.ref(x, forget)
    except TypeError:
        return None


def _enter_context(run: Run, tensors: tuple[Any, ...], variant: Hashable) -> None:
    conditions = (*map(id, tensors), variant)
    ordinal = run.calls[conditions] = run.calls.get(conditions, -1) + 1
    key = (conditions, ordinal)
    context = run.contexts.get(key)
    if context is None or not context.is_of(tensors):
        contexts = run.contexts

        def forget(_: Any) -> None:
            # The state of a context is freed together with its tensors, also after an interrupt.
            contexts.pop(key, None)

        context = Context(tensors, forget)
        if ordinal < MOST_CALLS:
            contexts[key] = context
    context.step = run.step
    run.context = context


def _was_told(driver: Any) -> bool:
    """Return whether `set_timesteps` was called; before that, `timesteps` are those of training."""
    scheduler = driver.scheduler if isinstance(driver, SamplingLoop) else driver
    return scheduler is None or getattr(scheduler, "num_inference_steps", 1) is not None


def _by_storage(drivers: list[Any], timestep: Any) -> Position | None:
    """Return the position of a call whose timestep is a view of a driver's timesteps; None if it is not."""
    for driver in drivers:
        timesteps = getattr(driver, "timesteps", None)
        if not isinstance(timesteps, Tensor) or not same_storage(timestep, timesteps):
            continue
        index = index_in(timestep, timesteps)
        if index is not None and _was_told(driver):
            return Position(driver, timesteps, index)
    return None


def _by_count(driver: Any) -> Position | None:
    """Return the position that the driver itself counts; None if it is not running."""
    timesteps = getattr(driver, "timesteps", None)
    if not isinstance(timesteps, Tensor) or not _was_told(driver):
        return None
    index: int | None = None
    scheduler = driver
    if isinstance(driver, SamplingLoop):
        index, scheduler = driver.step, driver.scheduler
        if index is None and scheduler is None:
            return None
    counted = index is None
    if index is None:
        position = getattr(scheduler, "step_index", None)
        index = getattr(scheduler, "begin_index", None) if position is None else position
    index = index or 0
    return Position(driver, timesteps, index, counted) if 0 <= index < len(timesteps) else None
