"""Run, step and context of calls, from schedulers, timesteps and conditions."""

import pytest
import torch

from dit_accel.runtime.clock import Clock
from dit_accel.runtime.loop import SamplingLoop

TRANSFORMER = torch.nn.Identity()


class Scheduler:
    """Scheduler that counts its steps like those of diffusers."""

    order = 1

    def __init__(self, steps=None, begin=None):
        self.num_inference_steps = None
        self.timesteps = torch.arange(1000, dtype=torch.float32)
        self.begin_index = begin
        if steps is not None:
            self.set_timesteps(steps, begin)

    def set_timesteps(self, steps, begin=None):
        self.num_inference_steps = steps
        self.timesteps = torch.linspace(1000, 1, steps)
        self.sigmas = torch.linspace(1, 0, steps + 1)
        self.step_index, self.begin_index = None, begin

    def step(self, began=0):
        self.step_index = (began if self.step_index is None else self.step_index) + 1


class Pipe:
    def __init__(self, scheduler, transformer=TRANSFORMER):
        self.scheduler, self.transformer = scheduler, transformer


def follow(pipe):
    clock = Clock()
    clock.follow(pipe)
    return clock


def view(scheduler, index, rows=2):
    return scheduler.timesteps[index].expand(rows)


def tick(clock, timestep, *conditions, variant=None, transformer=TRANSFORMER):
    new = clock.tick(transformer, timestep, conditions, variant)
    return new, clock.run.step


@torch.no_grad()
def test_the_offset_of_a_view_is_the_step():
    scheduler = Scheduler(5)
    pipe, text = Pipe(scheduler), torch.zeros(1)
    clock = follow(pipe)
    seen = [tick(clock, view(scheduler, i), text) for i in range(5)]
    assert seen == [(True, 0), (False, 1), (False, 2), (False, 3), (False, 4)]
    assert (clock.run.num_steps, clock.run.scheduler, clock.run.pipe) == (5, scheduler, pipe)
    assert clock.run.is_last_step
    torch.testing.assert_close(clock.run.sigmas(), scheduler.sigmas)


@torch.no_grad()
def test_repeated_and_rising_timesteps_do_not_matter():
    scheduler = Scheduler(4)
    scheduler.timesteps = torch.tensor([0.1, 0.5, 0.5, 0.9])
    pipe, text = Pipe(scheduler), torch.zeros(1)
    clock = follow(pipe)
    assert [tick(clock, view(scheduler, i), text)[1] for i in range(4)] == [0, 1, 2, 3]


@torch.no_grad()
@pytest.mark.parametrize("told", [True, False])
def test_a_late_beginning_shortens_the_run(told):
    scheduler = Scheduler(10, begin=4 if told else None)
    pipe, text = Pipe(scheduler), torch.zeros(1)
    clock = follow(pipe)
    assert [tick(clock, view(scheduler, i), text)[1] for i in range(4, 10)] == list(range(6))
    assert clock.run.num_steps == 6
    assert len(clock.run.sigmas()) == 7


@torch.no_grad()
@pytest.mark.parametrize("began", [0, 3])
def test_computed_timesteps_follow_the_count_of_the_scheduler(began):
    """Lumina computes a new timestep tensor, and a scheduler may begin late without `begin_index`."""
    scheduler = Scheduler(10)
    pipe, text = Pipe(scheduler), torch.zeros(1)
    clock = follow(pipe)
    seen = []
    for i in range(began, 10):
        seen.append(tick(clock, 1 - view(scheduler, i) / 1000, text)[1])
        scheduler.step(began)
    assert seen == list(range(10 - began))
    assert clock.run.num_steps == 10 - began


@torch.no_grad()
def test_new_timesteps_or_a_step_back_begin_a_run():
    scheduler = Scheduler(5)
    pipe, text = Pipe(scheduler), torch.zeros(1)
    clock = follow(pipe)
    assert tick(clock, view(scheduler, 0), text) == (True, 0)
    assert tick(clock, view(scheduler, 3), text) == (False, 3)
    assert tick(clock, view(scheduler, 3), text) == (False, 3)
    assert tick(clock, view(scheduler, 0), text) == (True, 0)
    scheduler.set_timesteps(5)
    assert tick(clock, view(scheduler, 0), text) == (True, 0)


@torch.no_grad()
def test_a_scheduler_that_was_not_told_its_steps_drives_nothing():
    scheduler = Scheduler()
    pipe = Pipe(scheduler)
    clock = follow(pipe)
    for timestep in (scheduler.timesteps[400].expand(1), torch.tensor([400.0])):
        tick(clock, timestep, torch.zeros(1))
        assert not clock.run.in_loop


@torch.no_grad()
def test_calls_after_the_last_step_are_outside():
    scheduler = Scheduler(2)
    pipe, text = Pipe(scheduler), torch.zeros(1)
    clock = follow(pipe)
    for _ in range(2):
        tick(clock, torch.zeros(1), text)
        assert clock.run.in_loop
        scheduler.step()
    assert tick(clock, torch.zeros(1), text) == (True, 0)
    assert not clock.run.in_loop


def test_calls_with_gradients_are_outside_unless_the_timestep_tells():
    scheduler = Scheduler(3)
    pipe, text = Pipe(scheduler), torch.zeros(1)
    clock = follow(pipe)
    tick(clock, torch.full((2,), 600.0), text)
    assert not clock.run.in_loop
    tick(clock, view(scheduler, 1), text)
    assert clock.run.in_loop


def test_calls_outside_of_loops_are_counted_together():
    clock, text = Clock(), torch.zeros(1)
    assert [tick(clock, torch.zeros(1), text) for _ in range(3)] == [
        (True, 0),
        (False, 1),
        (False, 2),
    ]
    assert clock.run.num_steps is None
    assert not clock.run.is_last_step


class Caller(Pipe):
    """Pipeline that was not enabled."""

    def call(self, clock, timestep, text):
        return tick(
            clock, timestep, text, transformer=getattr(self.transformer, "module", self.transformer)
        )


@torch.no_grad()
@pytest.mark.parametrize("computed", [False, True], ids=["view", "computed"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_pipeline_that_is_calling_drives_its_own_run(computed, wrapped):
    first = Pipe(Scheduler(4))
    clock, text = follow(first), torch.zeros(1)
    tick(clock, view(first.scheduler, 0), text)
    wrapper = torch.nn.Module()
    wrapper.module = TRANSFORMER
    other = Caller(Scheduler(7), wrapper if wrapped else TRANSFORMER)
    for i in range(7):
        timestep = view(other.scheduler, i)
        step = other.call(clock, timestep * 2 if computed else timestep, text)[1]
        assert (step, clock.run.num_steps, clock.run.pipe) == (i, 7, other)
        other.scheduler.step()
    assert tick(clock, view(first.scheduler, 1), text) == (False, 1)  # and the first one goes on


@torch.no_grad()
def test_runs_may_alternate():
    pipes = [Caller(Scheduler(3)), Caller(Scheduler(5))]
    clock, text = Clock(), torch.zeros(1)
    for i in range(3):
        for pipe in pipes:
            assert pipe.call(clock, view(pipe.scheduler, i), text)[1] == i
            assert clock.run.num_steps == pipe.scheduler.num_inference_steps


@torch.no_grad()
def test_a_replaced_scheduler_is_followed():
    pipe, text = Pipe(Scheduler(4)), torch.zeros(1)
    clock = follow(pipe)
    tick(clock, view(pipe.scheduler, 0), text)
    pipe.scheduler = Scheduler(6)
    assert tick(clock, view(pipe.scheduler, 0), text) == (True, 0)
    assert clock.run.num_steps == 6


@torch.no_grad()
@pytest.mark.parametrize("how", ["scheduler, view", "scheduler, computed", "timesteps", "step"])
def test_declared_loops(how):
    clock, text, scheduler = Clock(), torch.zeros(1), Scheduler(5)
    if how.startswith("scheduler"):
        loop = SamplingLoop(scheduler)
    else:
        loop = SamplingLoop(timesteps=scheduler.timesteps, sigmas=scheduler.sigmas)
    with clock.declare(loop):
        for i in range(5):
            timestep = view(scheduler, i)
            if how == "step":
                loop.step = i
            tick(clock, timestep if how in ("scheduler, view", "timesteps") else timestep * 2, text)
            assert (clock.run.step, clock.run.num_steps) == (i, 5)
            torch.testing.assert_close(clock.run.sigmas(), scheduler.sigmas)
            scheduler.step()
    tick(clock, torch.zeros(1), text)
    assert not clock.run.in_loop


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({}, "scheduler"),
        ({"scheduler": Scheduler(3), "timesteps": torch.ones(3)}, "timesteps"),
        ({"scheduler": object()}, "scheduler"),
        ({"timesteps": torch.ones(2, 2)}, "timesteps"),
        ({"timesteps": [1, 2]}, "timesteps"),
        ({"timesteps": torch.ones(3), "sigmas": torch.ones(2)}, "sigmas"),
        ({"timesteps": torch.ones(3), "sigmas": 1.0}, "sigmas"),
    ],
)
def test_loops_that_cannot_be_followed_are_refused(arguments, name):
    with pytest.raises(ValueError, match=name):
        SamplingLoop(**arguments)


# Contexts -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_conditions_variants_and_ordinals_tell_contexts_apart():
    scheduler = Scheduler(3)
    pipe = Pipe(scheduler)
    clock = follow(pipe)
    text, negative, image, blank = torch.zeros(4, 1)
    calls = [
        ((text,), None),
        ((negative,), None),
        ((text,), None),  # a second call of this step with the same text
        ((text,), (1, 2)),  # skipped layers
        ((text, image), None),
        ((text, blank), None),
    ]
    steps = []
    for i in range(3):
        contexts = []
        for conditions, variant in calls:
            tick(clock, view(scheduler, i), *conditions, variant=variant)
            contexts.append(clock.run.context)
        steps.append(contexts)
    assert len(set(map(id, steps[0]))) == len(calls)
    assert steps[0] == steps[1] == steps[2]


@torch.no_grad()
@pytest.mark.parametrize("which", [0, 1])
def test_a_context_goes_with_its_tensors(which):
    scheduler = Scheduler(3)
    pipe = Pipe(scheduler)
    clock = follow(pipe)
    conditions = [torch.zeros(1), torch.zeros(1)]
    tick(clock, view(scheduler, 0), *conditions)
    assert len(clock.run.contexts) == 1
    del conditions[which]
    assert not clock.run.contexts


def test_a_clock_keeps_no_pipeline_and_no_scheduler_alive():
    pipe = Pipe(Scheduler(3))
    clock = follow(pipe)
    tick(clock, view(pipe.scheduler, 0), torch.zeros(1))
    run = clock.run
    del pipe
    assert run.pipe is None
    assert run.scheduler is None


@torch.no_grad()
def test_a_declared_loop_whose_step_is_not_known_says_so():
    clock, scheduler = Clock(), Scheduler(5)
    loop = SamplingLoop(timesteps=scheduler.timesteps, sigmas=scheduler.sigmas)
    with clock.declare(loop), pytest.raises(ValueError, match=r"loop\.step=None"):
        tick(clock, view(scheduler, 0) * 2, torch.zeros(1))


@pytest.mark.parametrize("step", [-1, 5, "a", 1.0, True])
def test_steps_that_a_loop_does_not_have_are_refused(step):
    loop = SamplingLoop(Scheduler(5))
    with pytest.raises(ValueError, match=f"step={step!r}"):
        loop.step = step
