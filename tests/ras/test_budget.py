"""Schedules for a budget, compared with all possible schedules, and settings of users."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.config import RASConfig
from dit_accel.ras.budget import UNITS, error_left, least_error, step_intervals, step_weights
from dit_accel.ras.levels import noise_levels
from dit_accel.ras.schedule import plan_steps
from dit_accel.runtime.run import Run

LETTERS = {"dense": "F", "partial": "p", "forecast": "-"}


def flow(steps, shift=3.0):
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.tolist()


def predicted(kinds, weights, partial):
    """Return the error that `least_error` minimises; inf if two partial steps follow the same dense step."""
    total, last, ran = 0.0, None, None
    for k, kind in enumerate(kinds):
        if kind == "dense":
            last, ran = k, None
            continue
        error = (weights[k] * (k - last)) ** 2
        if kind == "partial":
            if ran is not None:
                return math.inf
            ran = k
        if ran is not None:
            left = error_left(partial[ran][0])
            error = left * error + (1 - left) * (weights[k] * (k - ran)) ** 2
        total += error
    return total


@settings(max_examples=30)
@given(
    levels=st.lists(st.floats(0.01, 0.99), min_size=3, max_size=7, unique=True),
    share=st.floats(0.2, 1.0),
    ratio=st.none() | st.sampled_from([0.125, 0.25, 0.5]),
    dense=st.sets(st.integers(0, 6)),
)
def test_no_other_schedule_has_less_predicted_error(levels, share, ratio, dense):
    levels = [*sorted(levels, reverse=True), 0.0]
    steps = len(levels) - 1
    dense = {0, *(k for k in dense if k < steps)}
    # Costs in whole units, so that rounding them up changes nothing.
    cost = None if ratio is None else math.ceil(ratio * UNITS) / UNITS
    partial = [None if ratio is None else (ratio, cost)] * steps
    budget = max(share * steps, len(dense))
    weights = step_weights(levels)

    def price(kinds):
        return sum({"dense": 1.0, "partial": cost, "forecast": 0.0}[x] for x in kinds)

    choices = ["dense", "forecast"] + ([] if ratio is None else ["partial"])
    every = [
        kinds
        for kinds in itertools.product(choices, repeat=steps)
        if all(kinds[k] == "dense" for k in dense) and price(kinds) <= budget + 1e-6
    ]
    best = min(predicted(kinds, weights, partial) for kinds in every)
    found = least_error(levels, budget, dense, partial)
    assert all(found[k] == "dense" for k in dense)
    assert price(found) <= budget + 1e-6
    assert predicted(found, weights, partial) == pytest.approx(best, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("steps", "runs", "expected"),
    [
        (12, 9, "FFFFF-F-F-FF"),
        (20, 13, "FFFFF-F-F-F-F-F-F-FF"),
        (20, 10, "FFF-F-F--F--F--F--FF"),
        (50, 20, "FFFFF-F-F-F--F--F--F--F--F---F---F---F---F---F--FF"),
    ],
)
def test_schedules_that_were_measured(steps, runs, expected):
    plan = plan_steps(RASConfig(budget=runs / steps), steps, 256, levels=flow(steps))
    assert "".join("F" if x is None else "-" for x in plan.tiles) == expected


def test_a_budget_that_the_dense_steps_exceed_is_spent_on_them_alone():
    plan = plan_steps(RASConfig(budget=0.1), 12, 256, levels=flow(12))
    assert plan.tiles == (None,) * 3 + (0,) * 7 + (None,) * 2


@pytest.mark.parametrize("budget", [1, 1.0])
def test_the_whole_budget_is_dense_sampling(budget):
    assert set(plan_steps(RASConfig(budget=budget), 12, 256, levels=flow(12)).tiles) == {None}


def test_the_fields_of_the_config_override_a_budget():
    config = RASConfig(budget=0.5, warmup=1, tail=0, resets=(7, 0.5))
    tiles = plan_steps(config, 20, 256, levels=flow(20)).tiles
    assert tiles[0] is tiles[7] is tiles[10] is None
    assert sum(x is None for x in tiles) == 10


def test_budget_and_ratio_mix_three_kinds_of_steps():
    config = RASConfig(budget=0.75, ratio=0.25)
    plan = plan_steps(config, 12, 256, levels=flow(12), cost=lambda share: 0.3)
    assert {0, 4, None} == set(plan.tiles)
    assert sum(1.0 if x is None else 0.3 if x else 0.0 for x in plan.tiles) <= 9
    partial = [k for k, x in enumerate(plan.tiles) if x]
    between = [None in plan.tiles[a:b] for a, b in itertools.pairwise(partial)]
    assert partial
    assert all(between)


def test_a_budget_by_the_number_of_steps():
    config = RASConfig(budget=[(0, 0.75), (15, 0.65), (31, 0.4)])
    assert [config.budget_of(n) for n in (1, 14, 15, 30, 31, 50)] == [
        0.75,
        0.75,
        0.65,
        0.65,
        0.4,
        0.4,
    ]
    assert RASConfig() == RASConfig.load("balanced")
    assert RASConfig(ratio=0.5).budget is None


@pytest.mark.parametrize(
    "budget", [0, 1.5, -1, True, [], [(1, 0.5)], [(0, 0.5), (0, 0.4)], [(0, 2)], [(0.5, 1)]]
)
def test_bad_budgets_are_refused_by_name(budget):
    with pytest.raises(ValueError, match="budget"):
        RASConfig(budget=budget)


def test_calls_of_one_solver_step_share_its_interval():
    """Heun: levels 1, .6, .6, .2, .2, 0 of the calls at 1 | .6 | .6 | .2 | .2."""
    levels = [1.0, 0.6, 0.6, 0.2, 0.2, 0.0]
    assert step_intervals(levels) == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.1])
    assert step_intervals([1.0, 0.6, 0.2, 0.0]) == pytest.approx([0.4, 0.4, 0.2])


def test_levels_must_be_one_more_than_the_steps():
    with pytest.raises(ValueError, match=r"levels: 3 .*4"):
        least_error([1.0, 0.5, 0.0], 2, {0}, [None] * 3)


def run_of(scheduler, steps=5, begin=0):
    scheduler.set_timesteps(steps)
    return Run(scheduler.timesteps, scheduler=scheduler, begin=begin)


def test_noise_levels_of_every_kind_of_scheduler():
    from diffusers import (
        DDIMScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
        UniPCMultistepScheduler,
    )

    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    levels = noise_levels(run_of(euler))
    torch.testing.assert_close(levels, euler.sigmas)
    torch.testing.assert_close(noise_levels(run_of(euler, begin=2)), euler.sigmas[2:])

    # sigma = noise / signal: s = sigma / (1 + sigma)
    for scheduler in (EulerDiscreteScheduler(), UniPCMultistepScheduler()):
        run = run_of(scheduler)
        sigmas = scheduler.sigmas.float()
        torch.testing.assert_close(noise_levels(run), sigmas / (1 + sigmas))

    ddim = DDIMScheduler()
    run = run_of(ddim)
    signal = ddim.alphas_cumprod[ddim.timesteps]
    expected = (1 - signal).sqrt() / ((1 - signal).sqrt() + signal.sqrt())
    torch.testing.assert_close(noise_levels(run)[:-1], expected)
    assert noise_levels(run)[-1] == 0

    loop = Run(torch.arange(3.0), sigmas=torch.tensor([1.0, 0.5, 0.25]))
    assert noise_levels(loop).tolist() == [1.0, 0.5, 0.25, 0.0]
    assert noise_levels(Run(torch.arange(3.0))) is None
    assert noise_levels(Run()) is None
