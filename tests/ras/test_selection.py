"""Tile selection: pure functions, compared with plain definitions."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.config import RASConfig
from dit_accel.ras.schedule import plan_steps
from dit_accel.ras.selection import (
    band_score,
    choose,
    rank_by,
    tile_tokens,
    token_scores,
)
from dit_accel.ras.tile_selection import TileSelection


def test_tiles_cover_all_tokens_and_repeat_the_last_one_of_a_short_tile():
    members = tile_tokens(37, 16, torch.device("cpu"))
    assert members.shape == (3, 16)
    assert members.flatten().unique().tolist() == list(range(37))
    assert members[2].tolist() == [32, 33, 34, 35, *[36] * 12]


def test_rank_by_is_the_place_in_falling_order():
    score = torch.tensor([[0.1, 0.9, 0.5], [3.0, 2.0, 1.0], [0.0, 1.0, 0.0]])
    assert rank_by(score).tolist() == [[2, 0, 1], [0, 1, 2], [1, 0, 2]]


@pytest.mark.parametrize(
    ("high_ratio", "expected"), [(1.0, [0, 1, 2]), (0.0, [7, 8, 9]), (0.5, [3, 4, 5])]
)
def test_high_ratio_says_which_end_is_left_out(high_ratio, expected):
    metric = torch.arange(10.0)[None]
    score = band_score(metric, 3, high_ratio)
    assert sorted(score[0].topk(3).indices.tolist()) == expected


def test_the_region_metric_is_the_papers():
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(1, 5, 4 * 16, generator=generator)  # 2 x 2 positions of 16 channels
    cells = change.view(1, 5, 4, 16)
    std = torch.stack([cells[..., i, :].std(-1, unbiased=True) for i in range(4)]).mean(0)
    torch.testing.assert_close(token_scores(change, "std", 4), std)
    norm = cells.square().sum(-1).sqrt().mean(-1)
    torch.testing.assert_close(token_scores(change, "l2norm", 4), norm)


def best_by_trying(score, age, capacity, count, max_age):
    """Return the choice with the largest total score that keeps the age limit."""
    m = len(score)

    def legal(chosen):
        for j, later in enumerate(capacity[: max_age + 1]):
            if later is None:
                return True
            due = [i for i in range(m) if age[i] >= max_age - j and i not in chosen]
            if len(due) > later:
                return False
        return True

    sets = [set(c) for c in itertools.combinations(range(m), count)]
    return max((c for c in sets if legal(c)), key=lambda c: sum(score[i] for i in c), default=None)


@settings(max_examples=60)
@given(data=st.data())
def test_choose_is_the_best_legal_choice(data):
    m = data.draw(st.integers(1, 7))
    count = data.draw(st.integers(1, m))
    max_age = data.draw(st.integers(0, 4))
    age = data.draw(st.lists(st.integers(0, max_age), min_size=m, max_size=m))
    order = data.draw(st.permutations(range(m)))
    score = [2.0**place for place in order]  # no two sets have the same sum
    capacity = [j * count for j in range(max_age + 1)]
    expected = best_by_trying(score, age, capacity, count, max_age)
    if expected is None:
        return  # not reachable from a dense step
    got = choose(
        torch.tensor([score], dtype=torch.float64),
        torch.tensor([age]),
        list(capacity),
        count,
        max_age,
    )
    assert got[0].tolist() == sorted(expected)


RATIO = st.floats(0.06, 1.0)
CONFIGS = st.builds(
    RASConfig,
    selection=st.sampled_from(["age", "std", "l2norm", "random"]),
    ratio=st.one_of(RATIO, st.tuples(RATIO, RATIO).map(lambda x: [(0, x[0]), (0.4, x[1])])),
    warmup=st.integers(1, 4),
    tail=st.integers(0, 2),
    resets=st.lists(st.floats(0.1, 0.9), max_size=3),
    high_ratio=st.sampled_from([1.0, 0.3]),
    region=st.sampled_from(["tile", "token"]),
    n_levels=st.sampled_from([None, 1, 3]),
)


@given(
    config=CONFIGS,
    num_steps=st.integers(2, 40),
    tokens=st.integers(16, 300),
    seed=st.integers(0, 1000),
)
def test_no_token_is_ever_older_than_max_age(config, num_steps, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    plan = plan_steps(config, num_steps, tokens)
    selection = TileSelection(config, plan, 2, torch.device("cpu"))
    age = torch.zeros(2, plan.num_tiles, dtype=torch.long)
    for step in range(num_steps):
        metric = torch.rand(2, plan.num_tiles, generator=generator)
        selection.begin_step(step, metric)
        age += 1  # counted again, by what was chosen
        if selection.tiles is None:
            age.zero_()
        else:
            assert selection.tiles.shape == (2, plan.tiles[step])
            assert (selection.tiles.diff(dim=1) > 0).all()
            age.scatter_(1, selection.tiles, 0)
        assert int(age.max()) <= config.age_limit
        torch.testing.assert_close(selection.age, age)


def test_ages_alone_update_everything_in_turn():
    config = RASConfig(ratio=0.25, warmup=1, resets=(), tail=0)
    plan = plan_steps(config, 9, 64 * 64)
    selection = TileSelection(config, plan, 1, torch.device("cpu"))
    seen = []
    for step in range(9):
        selection.begin_step(step, None)
        if selection.tiles is not None:
            seen += selection.tiles[0].tolist()
    assert sorted(seen) == sorted([*range(64)] * 2)


def test_a_step_is_chosen_once_for_all_its_contexts():
    config = RASConfig(ratio=0.5, selection="random", warmup=1)
    selection = TileSelection(config, plan_steps(config, 9, 640), 1, torch.device("cpu"))
    selection.begin_step(0, None)
    selection.begin_step(1, None)
    first, age = selection.tiles.clone(), selection.age.clone()
    selection.begin_step(1, None)
    torch.testing.assert_close(selection.tiles, first)
    torch.testing.assert_close(selection.age, age)
