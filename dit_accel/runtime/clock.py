"""`Clock`: tells which run, step and context a transformer call belongs to, without a device sync."""

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
"""Calls of a step with the same conditions that are told apart. Guidance makes three or four of them; more are a
loop whose step is not known, and nothing is kept for them."""


@dataclass
class Position:
    """Position of a call in a sampling loop."""

    driver: Any
    """A scheduler, or a declared loop."""
    timesteps: Tensor
    index: int
    """Index of the step in `timesteps`."""
    counted: bool = False
    """True if the index is known from the driver's own count only."""
    pipe: weakref.ref | None = None
    """The pipeline that runs, if it is known."""

    @property
    def scheduler(self) -> Any:
        """Scheduler of the driver; None for a loop without one."""
        return self.driver.scheduler if isinstance(self.driver, SamplingLoop) else self.driver


class Clock:
    """Follows the calls of one transformer.

    The driver of a call is the first of these that is found:

    1. a known scheduler (of an enabled pipeline, of a pipeline seen calling, of a declared loop) of whose
       `timesteps` the call's `timestep` is a view: same storage, and the offset is the step;
    2. the nearest caller that is a pipeline or has declared a loop (`sampling_loop`);
    3. the scheduler of the enabled pipeline.

    Pipelines drive calls while they move only: told their steps, not past the last one, gradients off.

    Without a driver the call is outside of any sampling loop.

    A run is one pass of a scheduler over its timesteps. New timesteps, or a step back, begin another. A context
    is the identity of the tensors that a call is conditioned on, what the family adds to it, and which call of
    that step it is.
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
        """Know the scheduler of this pipeline from now on."""
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

        # Not a WeakSet: a scheduler may have no hash.
        reference = _weak(scheduler, forget)
        if reference is not None:
            known[key] = reference

    def _schedulers(self) -> list[Any]:
        return [x for ref in list(self._known.values()) if (x := ref()) is not None]

    def forget(self) -> None:
        """Begin anew with the next call: methods were put on or taken off."""
        self.run = None
        for key in list(self._runs):
            _close(self._runs, key)

    @contextlib.contextmanager
    def declare(self, loop: SamplingLoop) -> Iterator[None]:
        """Calls inside the block belong to this loop."""
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
        """Note a call.

        Args:
            transformer: the module that is called.
            timestep: its argument of that name.
            tensors: what the call is conditioned on: text embeddings, image embeddings.
            variant: what else tells calls of a step apart.

        Returns:
            Whether it begins a new run.
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
            self._know(pipe.scheduler)  # it may have been replaced
        if found := _by_storage([*self.loops, *self._schedulers()], timestep):
            if pipe is not None and pipe.scheduler is found.driver:
                found.pipe = self._pipe
            return found
        moving = not torch.is_grad_enabled()  # else it is training
        if moving or self.loops:
            caller = calling_driver(transformer, timestep, self.loops, pipelines=moving)
            if caller is None:
                caller = self._loop_of_this_thread()
            if isinstance(caller, SamplingLoop):
                if caller.scheduler is None and caller.step is None:
                    raise ValueError(
                        "timestep: no view of the timesteps of this sampling_loop, and loop.step=None; accepted is "
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
        """The pipeline that calls this transformer in a loop over its own scheduler; None: there is none."""
        if isinstance(position.driver, SamplingLoop):
            return None
        pipe = calling_driver(transformer, None, (), pipelines=True)
        return _weak(pipe) if getattr(pipe, "scheduler", None) is position.driver else None

    def _loop_of_this_thread(self) -> SamplingLoop | None:
        """The last loop of this thread that was declared by a function that has returned since."""
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
                run.begin_at(index - 1)  # only its first step tells where a silent scheduler began
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
            if first <= index < end:  # else the pipeline has another rule
                run.begin, run.end = max(begin, first), end
        run.begin_assumed = position.counted and told is None
        return run, index - run.begin, True


def _close(runs: dict[int, Run], key: int) -> None:
    """Forget a run. Its contexts refer to each other in a circle, so they are let go by hand."""
    run = runs.pop(key, None)
    if run is not None:
        run.contexts.clear()


def _weak(x: Any, forget: Any = None) -> weakref.ref | None:
    """A weak reference; None for an object that cannot have one."""
    try:
        return weakref.ref(x, forget)
    except TypeError:
        return None


def _enter_context(run: Run, tensors: tuple[Any, ...], variant: Hashable) -> None:
    what = (*map(id, tensors), variant)
    ordinal = run.calls[what] = run.calls.get(what, -1) + 1
    key = (what, ordinal)
    context = run.contexts.get(key)
    if context is None or not context.is_of(tensors):
        contexts = run.contexts

        def forget(_: Any) -> None:
            # With its tensors goes all that methods keep for a context, also after an interrupt.
            contexts.pop(key, None)

        context = Context(tensors, forget)
        if ordinal < MOST_CALLS:
            contexts[key] = context
    context.step = run.step
    run.context = context


def _was_told(driver: Any) -> bool:
    """Return whether a scheduler was told its steps; before that its timesteps are those of training."""
    scheduler = driver.scheduler if isinstance(driver, SamplingLoop) else driver
    return scheduler is None or getattr(scheduler, "num_inference_steps", 1) is not None


def _by_storage(drivers: list[Any], timestep: Any) -> Position | None:
    """The driver of whose timesteps this is a view."""
    for driver in drivers:
        timesteps = getattr(driver, "timesteps", None)
        if not isinstance(timesteps, Tensor) or not same_storage(timestep, timesteps):
            continue
        index = index_in(timestep, timesteps)
        if index is not None and _was_told(driver):
            return Position(driver, timesteps, index)
    return None


def _by_count(driver: Any) -> Position | None:
    """The step that the driver itself counts; None if it does not move."""
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
