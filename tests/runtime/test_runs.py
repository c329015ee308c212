"""Calls belong to the run that drives them, if pipelines and loops share a transformer."""

import collections
import contextlib
import copy
import functools
import gc
import threading

import pytest
import torch

import dit_accel

from ..random_pipelines import embeddings, make, relative, run, scheduler
from .own_loops import BOTH, RAS, SLA, Conditions, steps_of

FAMILIES = ("wan", "sd3", "lumina", "lumina2")
every_family = pytest.mark.parametrize("family", FAMILIES)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@functools.cache
def alone(family, solver, steps, **changed):
    """Return latents and counts of an accelerated pipeline that shares no component."""
    pipe = make(family, solver)
    dit_accel.enable(pipe, **BOTH)
    latents = run(pipe, family, steps=steps, **changed)
    counts = steps_of(dit_accel.summary(pipe))
    assert any(mode == "partial" for _, mode, *_ in counts[0]), "this call accelerates nothing"
    return latents, counts


def expect_alone(pipe, family, solver, steps, **changed):
    latents, counts = alone(family, solver, steps, **changed)
    same(run(pipe, family, steps=steps, **changed), latents)
    assert steps_of(dit_accel.summary(pipe)) == counts


# Several pipelines on one transformer ---------------------------------------------------------------


def from_components(pipe, new):
    return type(pipe)(**{**pipe.components, "scheduler": new})


def shallow_copy(pipe, new):
    other = copy.copy(pipe)
    other.scheduler = new
    return other


def from_pipe(pipe, new):
    other = type(pipe).from_pipe(pipe)
    other.scheduler = new
    return other


def deep_copy(pipe, new):
    other = copy.deepcopy(pipe)
    other.scheduler = new
    return other


def replaced_later(pipe, new):
    pipe.scheduler = new
    return pipe


SOLVERS = {
    "wan": ("unipc", "euler"),
    "sd3": ("euler", "heun"),
    "lumina": ("euler", "dpm++"),
    "lumina2": ("unipc", "euler"),
}


@pytest.mark.parametrize(
    ("family", "make_other"),
    [
        *(("sd3", x) for x in (from_components, deep_copy)),
        *(("lumina", x) for x in (shallow_copy, replaced_later)),
        *(("wan", from_pipe), ("lumina2", from_components)),
    ],
)
def test_a_second_pipeline_has_its_own_runs(family, make_other):
    first, second = SOLVERS[family]
    pipe = make(family, first)
    dit_accel.enable(pipe, **BOTH)
    expect_alone(pipe, family, first, 6)
    other = make_other(pipe, scheduler(second))
    other.set_progress_bar_config(disable=True)
    expect_alone(other, family, second, 6)
    if other is not pipe:
        expect_alone(pipe, family, first, 6)
    del pipe
    gc.collect()
    expect_alone(other, family, second, 6)


def interleaved(*calls):
    """Return the results of calls that alternate step by step. Each call gets a callback for the end of its steps."""
    turns, condition = collections.deque(range(len(calls))), threading.Condition()
    results = [None] * len(calls)

    def wait_for(i):
        assert condition.wait_for(lambda: turns[0] == i, timeout=60)

    def work(i):
        def end_of_step(pipe, step, timestep, kwargs):
            with condition:
                turns.rotate(-1)
                condition.notify_all()
                wait_for(i)
            return kwargs

        with condition:
            wait_for(i)
        try:
            results[i] = calls[i](end_of_step)
        except Exception as error:
            results[i] = error
        finally:
            with condition:
                turns.remove(i)
                condition.notify_all()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


@pytest.mark.parametrize(
    ("family", "enabled"),
    [
        ("wan", "transformer"),
        ("sd3", "pipeline"),
        ("lumina", "transformer"),
        ("lumina2", "pipeline"),
    ],
)
def test_pipelines_that_alternate_step_by_step(family, enabled):
    solvers = SOLVERS[family]
    pipe = make(family, solvers[0])
    other = from_components(pipe, scheduler(solvers[1]))
    other.set_progress_bar_config(disable=True)
    dit_accel.enable(pipe if enabled == "pipeline" else pipe.transformer, **BOTH)
    first, second = interleaved(
        lambda f: run(pipe, family, steps=6, callback_on_step_end=f),
        lambda f: run(other, family, (1,), steps=5, callback_on_step_end=f),
    )
    same(first, alone(family, solvers[0], 6)[0])
    same(second, alone(family, solvers[1], 5, prompts=(1,))[0])


@every_family
def test_a_preview_inside_of_a_callback(family):
    """Another pipeline runs completely between two steps of the first one."""
    pipe = make(family)
    other = from_components(pipe, scheduler("euler"))
    other.set_progress_bar_config(disable=True)
    dit_accel.enable(pipe, **BOTH)

    def preview(_, step, timestep, kwargs):
        if step == 4:
            expect_alone(other, family, "euler", 6)
        return kwargs

    latents, counts = alone(family, "euler", 6)
    same(run(pipe, family, steps=6, callback_on_step_end=preview), latents)
    assert steps_of(dit_accel.summary(pipe)) == counts


@pytest.mark.combines("sla and ras", "image to image")
def test_image_to_image_beside_text_to_image():
    from diffusers import StableDiffusion3Img2ImgPipeline

    def call(pipe, callback=None, **changed):
        text, negative = embeddings("sd3", [0]), embeddings("sd3", [-3])
        return pipe(
            **text,
            **{f"negative_{name}": x for name, x in negative.items()},
            image=torch.rand(1, 3, 176, 208, generator=torch.Generator().manual_seed(0)),
            strength=0.6,
            num_inference_steps=15,
            guidance_scale=2.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            callback_on_step_end=callback,
        ).images

    def image_pipe(pipe, **changed):
        other = StableDiffusion3Img2ImgPipeline(**{**pipe.components, **changed})
        other.set_progress_bar_config(disable=True)
        return other

    reference = image_pipe(make("sd3"))
    dit_accel.enable(reference, **BOTH)
    expected = call(reference)
    counts = steps_of(dit_accel.summary(reference))
    assert len(counts[0]) == 9
    pipe = make("sd3")
    dit_accel.enable(pipe, **BOTH)
    own, shared = image_pipe(pipe, scheduler=scheduler("euler")), image_pipe(pipe)
    for other in (own, shared):  # a scheduler of its own, and the very same one
        same(call(other), expected)
        assert steps_of(dit_accel.summary(pipe)) == counts
        expect_alone(pipe, "sd3", "euler", 6)
    first, second = interleaved(
        lambda f: run(pipe, "sd3", steps=6, callback_on_step_end=f), lambda f: call(own, f)
    )
    same(first, alone("sd3", "euler", 6)[0])
    same(second, expected)


# Own loops ------------------------------------------------------------------------------------------


def plan(kind, solver, transformer, start):
    """Return the scheduler of a loop and the context manager that declares it."""
    made = scheduler(solver)
    made.set_timesteps(10)
    if start:
        made.set_begin_index(start)
    declared = contextlib.nullcontext()
    if kind.startswith("scheduler"):
        declared = dit_accel.sampling_loop(transformer, made)
    elif kind != "pipeline":
        tensors = {"timesteps": made.timesteps.clone(), "sigmas": made.sigmas.clone()}
        declared = dit_accel.sampling_loop(transformer, **tensors)
    return made, declared


class PipelineLike:
    """Object with a transformer, a scheduler and a sampling loop, like a pipeline."""

    def __init__(self, transformer, scheduler):
        self.transformer, self.scheduler = transformer, scheduler

    def steps(self, *args, **kwargs):
        yield from steps_by_hand(self.transformer, self.scheduler, *args, **kwargs)

    def loop(self, *args, **kwargs):
        return list(self.steps(*args, **kwargs))[-1]


@torch.no_grad()
def steps_by_hand(transformer, made, family, view=True, start=0, loop=None, prompt=0):
    conditions = Conditions(family, prompt)
    latents = conditions.latents
    timesteps = made.timesteps if loop is None or loop.scheduler else loop.timesteps
    for i in range(start, len(timesteps)):
        t = timesteps[i]
        if loop is not None and not view:
            loop.step = i
        timestep = t.expand(1) if view else t.repeat(1)  # a new tensor, as the Luminas make it
        velocity = conditions.velocity(transformer, latents, timestep)
        latents = made.step(velocity, made.timesteps[i], latents, return_dict=False)[0]
        yield latents


def by_hand(family, kind, solver="euler", start=0, on=BOTH):
    pipe = make(family, solver)
    transformer = pipe.transformer
    dit_accel.enable(transformer, **on)
    made, declared = plan(kind, solver, transformer, start)
    view = kind in ("scheduler", "timesteps", "pipeline")
    with declared as loop:
        if kind.startswith("pipeline"):
            latents = PipelineLike(transformer, made).loop(family, view=view, start=start)
        else:
            told = loop if kind != "scheduler, counted" else None
            latents = list(
                steps_by_hand(transformer, made, family, view=view, start=start, loop=told)
            )[-1]
    return latents, steps_of(dit_accel.summary(transformer))


KINDS = ("scheduler", "scheduler, counted", "timesteps", "loop.step", "pipeline")


@pytest.mark.parametrize(
    ("family", "solver", "start"),
    [
        ("wan", "unipc", 0),
        ("sd3", "heun", 3),
        ("lumina", "dpm++", 4),
        ("lumina2", "euler", 0),
    ],
)
def test_loops_by_hand(family, solver, start):
    """Runs are the same for each way of declaring a loop, and for each first step."""
    expected, counts = by_hand(family, "scheduler", solver, start)
    length = (19 if solver == "heun" else 10) - start
    modes = [mode for _, mode, *_ in counts[0]]
    assert modes == ["dense"] * 2 + ["partial"] * (length - 3) + ["dense"]
    for kind in KINDS[1:]:
        latents, found = by_hand(family, kind, solver, start)
        assert found == counts, kind
        assert relative(latents, expected) < 1e-6, kind


@every_family
def test_loops_nobody_has_told_of_run_dense(family):
    pipe = make(family)
    plain = list(steps_by_hand(pipe.transformer, told("euler"), family))[-1]
    dit_accel.enable(pipe.transformer, ras=RAS)
    same(list(steps_by_hand(pipe.transformer, told("euler"), family))[-1], plain)
    report = dit_accel.summary(pipe).ras
    assert report.ras_steps == 0
    assert sum(report.dense_calls.values()) == 10
    with pytest.raises(RuntimeError):
        dit_accel.summary(pipe, strict=True)


def told(solver, steps=10):
    made = scheduler(solver)
    made.set_timesteps(steps)
    return made


@pytest.mark.parametrize(
    ("family", "how", "view"),
    [
        *(("wan", "declared", True), ("sd3", "pipeline", True), ("lumina", "declared", False)),
        *(("lumina2", "pipeline", False), ("sd3", "declared", False), ("wan", "pipeline", False)),
    ],
)
def test_loops_that_alternate_step_by_step(family, how, view):
    """Two generators on one transformer have separate runs."""
    pipe = make(family)
    transformer = pipe.transformer
    dit_accel.enable(transformer, **BOTH)

    def loop(made, prompt):
        if how == "pipeline":
            yield from PipelineLike(transformer, made).steps(family, view=view, prompt=prompt)
            return
        with dit_accel.sampling_loop(transformer, made):
            yield from steps_by_hand(transformer, made, family, view=view, prompt=prompt)

    expected = [list(loop(told("euler", n), i))[-1] for i, n in enumerate((8, 6))]
    loops = [loop(told("euler", n), i) for i, n in enumerate((8, 6))]
    last = [None, None]
    while loops[0] is not None or loops[1] is not None:
        for i in (0, 1):
            latents = None if loops[i] is None else next(loops[i], None)
            if latents is None:
                loops[i] = None
            else:
                last[i] = latents
    same(last[1], expected[1])
    same(last[0], expected[0])


@every_family
def test_a_pipeline_that_runs_inside_of_a_declared_loop(family):
    """A pipeline runs as a preview inside a declared loop. The Lumina pipelines compute their timesteps."""
    pipe = make(family)
    dit_accel.enable(pipe.transformer, **BOTH)
    made = told("euler")
    with dit_accel.sampling_loop(pipe.transformer, made):
        expected = list(steps_by_hand(pipe.transformer, made, family))[-1]
    made = told("euler")
    with dit_accel.sampling_loop(pipe.transformer, made):
        last = None
        for i, latents in enumerate(steps_by_hand(pipe.transformer, made, family)):
            last = latents
            if i == 4:
                expect_alone(pipe, family, "euler", 6)
    same(last, expected)


@every_family
def test_a_declared_loop_in_another_thread(family):
    """A declared loop belongs to its thread."""
    pipe = make(family)
    dit_accel.enable(pipe.transformer, **BOTH)
    expected = by_hand(family, "scheduler, counted")[0]

    def work(end_of_step):
        made = told("euler")
        with dit_accel.sampling_loop(pipe.transformer, made):
            last = None
            for latents in steps_by_hand(pipe.transformer, made, family, view=False):
                last = latents
                end_of_step(None, None, None, None)
        return last

    first, second = interleaved(work, lambda f: run(pipe, family, steps=6, callback_on_step_end=f))
    same(first, expected)
    same(second, alone(family, "euler", 6)[0])


@torch.no_grad()
def follow(transformer, made, family, indices, told_by="view"):
    """Return the velocities of some steps, each for different latents."""
    conditions = Conditions(family)
    with dit_accel.sampling_loop(transformer, timesteps=made.timesteps, sigmas=made.sigmas) as loop:
        out = []
        for i in indices:
            generator = torch.Generator().manual_seed(i)
            latents = torch.randn(conditions.latents.shape, generator=generator)
            t = made.timesteps[i]
            if told_by == "step":
                loop.step = i
            timestep = t.expand(1) if told_by == "view" else t.repeat(1)
            out.append(conditions.velocity(transformer, latents, timestep))
    return out


@pytest.mark.parametrize("told_by", ["view", "step"])
@every_family
def test_a_loop_that_jumps_back_begins_anew(family, told_by):
    pipe = make(family)
    indices = [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9]
    plain = follow(pipe.transformer, told("euler"), family, indices, told_by)
    dit_accel.enable(pipe.transformer, ras={**RAS, "ratio": 1.0})
    found = follow(pipe.transformer, told("euler"), family, indices, told_by)
    for a, b in zip(found, plain, strict=True):
        assert relative(a, b) < 1e-5
    # Without correction a dense step gives what the plain transformer gives.
    dit_accel.enable(pipe.transformer, ras={**RAS, "correction": 0})
    found = follow(pipe.transformer, told("euler"), family, indices, told_by)
    equal = [torch.equal(a, b) for a, b in zip(found, plain, strict=True)]
    assert equal == [True] * 2 + [False] * 4 + [True] * 2 + [False] * 4 + [True]
    report = dit_accel.summary(pipe).ras
    assert [x.mode for x in report.steps] == ["dense"] * 2 + ["partial"] * 4 + ["dense"]


@pytest.mark.parametrize("told_by", ["view", "step"])
def test_a_loop_that_leaves_steps_out(told_by):
    """A declared index is the step, also if steps are left out."""
    pipe = make("sd3")
    dit_accel.enable(pipe.transformer, ras=RAS)
    follow(pipe.transformer, told("euler", 12), "sd3", [0, 2, 4, 6, 8, 11], told_by)
    report = dit_accel.summary(pipe).ras
    assert [x.step for x in report.steps] == [0, 2, 4, 6, 8, 11]


class DataClassLike:
    """Class that compares by value and is not hashable, like data classes."""

    def __init__(self, **parts):
        vars(self).update(parts)

    __hash__ = None

    def __eq__(self, other):
        return vars(self) == vars(other)


@pytest.mark.parametrize("kind", ["dataclass pipe", "dataclass scheduler", "namedtuple pipe"])
def test_pipelines_and_schedulers_of_any_class(kind):
    pipe = make("sd3")
    made = told("euler")
    if kind == "dataclass scheduler":
        made = DataClassLike(
            timesteps=made.timesteps, sigmas=made.sigmas, step=made.step, num_inference_steps=10
        )
    like = PipelineLike(pipe.transformer, made)
    if kind == "dataclass pipe":
        like = DataClassLike(transformer=pipe.transformer, scheduler=made)
    elif kind == "namedtuple pipe":
        like = collections.namedtuple("Parts", "transformer scheduler")(pipe.transformer, made)
    dit_accel.enable(like, ras=RAS)
    latents = list(steps_by_hand(pipe.transformer, made, "sd3"))[-1]
    same(latents, by_hand("sd3", "scheduler", on={"ras": RAS})[0])
    assert dit_accel.summary(like).ras.ras_steps == 7


def test_a_caller_whose_scheduler_cannot_be_read_is_passed_over():
    class Trainer:
        @property
        def scheduler(self):
            raise RuntimeError("attached to no trainer")

        def call(self, *args):
            with torch.no_grad():
                return Conditions("sd3").velocity(*args)

    pipe = make("sd3")
    dit_accel.enable(pipe.transformer, sla=SLA)
    Trainer().call(pipe.transformer, Conditions("sd3").latents, torch.full((1,), 500.0))
    assert dit_accel.summary(pipe).sparse_calls > 0
