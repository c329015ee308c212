"""Schedules: pure functions of config, steps and tokens."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.config import RASConfig
from dit_accel.ras.schedule import dense_steps as dense_set
from dit_accel.ras.schedule import plan_steps, ratio_at, tile_size


def dense_steps(config, num_steps):
    return sorted(dense_set(config, num_steps))


@pytest.mark.parametrize(
    ("num_steps", "ratio", "expected"),
    [
        (20, 0.5, [0, 1, 2, 18, 19]),
        (19, 0.5, [0, 1, 2, 6, 10, 17, 18]),
        (39, 0.25, [*range(6), 12, 20, 37, 38]),
        (40, 0.25, [*range(6), 38, 39]),
        (40, [(0, 0.5), (0.5, 0.2)], [*range(6), 12, 20, 38, 39]),
        (4, 0.5, [0, 1, 2, 3]),
        (1, 0.5, [0]),
    ],
)
def test_default_dense_steps(num_steps, ratio, expected):
    assert dense_steps(RASConfig(ratio=ratio), num_steps) == expected


def test_integers_are_steps_and_floats_are_fractions():
    config = RASConfig(ratio=0.5, warmup=2, tail=3, resets=(5, 0.5))
    assert dense_steps(config, 20) == [0, 1, 5, 10, 17, 18, 19]
    assert dense_steps(RASConfig(ratio=0.5, warmup=0.2, tail=0.1, resets=()), 30) == [
        *range(6),
        27,
        28,
        29,
    ]


def test_resets_past_the_end_are_dropped_with_a_warning():
    with pytest.warns(UserWarning, match=r"resets: .*22.*20"):
        assert dense_steps(RASConfig(ratio=0.5, resets=(12, 22)), 20) == [0, 1, 2, 12, 18, 19]


def test_ratios_by_part_of_the_run():
    config = RASConfig(ratio=[(0, 0.75), (0.5, 0.25)], warmup=1, tail=0, resets=())
    assert dense_steps(config, 8) == [0]
    assert [ratio_at(config, k, 8) for k in range(1, 8)] == [0.75] * 3 + [0.25] * 4


def test_at_most_n_levels_counts_and_never_fewer_tokens_than_asked():
    pairs = [(i / 10, 1 - i / 12) for i in range(10)]
    free = plan_steps(RASConfig(ratio=pairs, n_levels=None), 60, 4096)
    three = plan_steps(RASConfig(ratio=pairs, n_levels=3), 60, 4096)
    one = plan_steps(RASConfig(ratio=pairs, n_levels=1), 60, 4096)
    for plan, most in ((free, 10), (three, 3), (one, 1)):
        assert len({n for n in plan.tiles if n is not None}) <= most
    for a, b, c in zip(free.tiles, three.tiles, one.tiles, strict=True):
        assert (a is None) == (b is None) == (c is None)
        assert a is None or a <= b <= c


@pytest.mark.parametrize(
    ("tokens", "size"), [(143, 16), (1088, 16), (2047, 16), (2048, 32), (4096, 64), (32760, 64)]
)
def test_tiles_are_smaller_on_short_sequences(tokens, size):
    assert tile_size(tokens, "tile") == size
    assert tile_size(tokens, "token") == 1


def test_active_tokens_are_close_to_the_ratio():
    for ratio in (0.5, 0.25, 0.125):
        plan = plan_steps(RASConfig(ratio=ratio), 20, 4096)
        assert {n for n in plan.tiles if n is not None} == {round(ratio * 64)}


@given(
    ratio=st.floats(0.05, 1.0),
    tokens=st.integers(16, 5000),
    num_steps=st.integers(1, 60),
    age=st.one_of(st.none(), st.just("auto"), st.integers(0, 30)),
)
def test_every_window_of_max_age_steps_can_update_everything(ratio, tokens, num_steps, age):
    if isinstance(age, int) and age < math.ceil(1 / ratio - 1e-9) - 1:
        return
    config = RASConfig(ratio=ratio, max_age=age)
    plan = plan_steps(config, num_steps, tokens)
    assert plan.num_steps == num_steps
    assert all(n is None or 1 <= n <= plan.num_tiles for n in plan.tiles)
    limit = config.age_limit
    if limit is not None:
        least = min((n for n in plan.tiles if n is not None), default=plan.num_tiles)
        assert least * (limit + 1) >= plan.num_tiles


def test_capacity_ends_at_the_next_dense_step():
    plan = plan_steps(RASConfig(ratio=0.5, warmup=1, tail=1, resets=(4,)), 8, 4096)
    assert plan.capacity(1, 4) == [0, 32, 64, None, None]
    assert plan.capacity(6, 2) == [0, None, None]


@pytest.mark.parametrize(("steps", "resets"), [(28, [12, 20]), (30, [12, 22])])
def test_preset_paper_has_the_dense_steps_of_the_published_code(steps, resets):
    assert dense_steps(RASConfig.load("paper"), steps) == [0, 1, 2, 3, *resets]


@pytest.mark.parametrize("steps", [10, 14, 20, 40, 50, 100])
def test_preset_paper_keeps_its_proportions_at_other_numbers_of_steps(steps):
    dense = dense_steps(RASConfig.load("paper"), steps)
    assert dense[:4] == [0, 1, 2, 3]
    assert [i / steps for i in dense[4:]] == pytest.approx([0.41, 0.73], abs=0.09)
    assert dense[-1] < steps - 1
