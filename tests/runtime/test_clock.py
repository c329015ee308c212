"""Runs, steps and contexts, read from schedulers and embeddings."""

from types import SimpleNamespace

import pytest
import torch

from dit_accel.models import family_of
from dit_accel.runtime.clock import Clock


@pytest.fixture
def pipe():
    return SimpleNamespaceWithWeakref(
        scheduler=SimpleNamespace(timesteps=torch.arange(3)), transformer=torch.nn.Identity()
    )


class SimpleNamespaceWithWeakref(SimpleNamespace):
    __slots__ = ("__weakref__",)


def ticks(clock, pipe, contexts):
    return [(clock.tick(pipe.transformer, c), clock.step) for c in contexts]


def test_guidance_halves_share_steps(pipe):
    clock, cond, uncond = Clock(pipe), torch.zeros(1), torch.zeros(1)
    seen = ticks(clock, pipe, [cond, uncond] * 3)
    assert seen == [(True, 0), (False, 0), (False, 1), (False, 1), (False, 2), (False, 2)]
    assert clock.num_steps == 3


def test_new_timesteps_begin_a_run_even_with_equal_values(pipe):
    clock, cond = Clock(pipe), torch.zeros(1)
    ticks(clock, pipe, [cond] * 2)
    pipe.scheduler.timesteps = torch.arange(3)
    assert ticks(clock, pipe, [cond]) == [(True, 0)]


def test_rising_and_repeated_timesteps_do_not_matter(pipe):
    pipe.scheduler.timesteps = torch.tensor([0.1, 0.5, 0.5, 0.9])
    clock, cond = Clock(pipe), torch.zeros(1)
    assert [step for _, step in ticks(clock, pipe, [cond] * 4)] == [0, 1, 2, 3]


def test_embeddings_replaced_in_mid_run_do_not_start_over(pipe):
    clock = Clock(pipe)
    ticks(clock, pipe, [torch.zeros(1)] * 1)
    first = torch.zeros(1)
    ticks(clock, pipe, [first] * 5)
    assert ticks(clock, pipe, [torch.ones(1)])[0][1] >= 4


def test_the_clock_survives_its_pipeline_when_the_transformer_is_shared(pipe):
    clock, cond, transformer, scheduler = (
        Clock(pipe),
        torch.zeros(1),
        pipe.transformer,
        pipe.scheduler,
    )
    clock.tick(transformer, cond)
    del pipe
    scheduler.timesteps = torch.arange(7)
    assert clock.tick(transformer, cond)
    assert clock.num_steps == 7


def test_unknown_transformers_are_refused():
    with pytest.raises(ValueError, match="Identity; accepted are WanTransformer3DModel"):
        family_of(torch.nn.Identity())
