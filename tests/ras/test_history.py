"""Predictors and buffers against plain formulas."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dit_accel.ras.engine import joint_index
from dit_accel.ras.history import History, KVStore
from dit_accel.ras.memory import bytes_per_token
from dit_accel.ras.predictor import extrapolate, extrapolation_factor


@given(
    values=st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3, unique=True).map(
        lambda x: sorted(x, reverse=True)
    )
)
def test_a_straight_line_is_extrapolated_exactly(values):
    before, last, now = values
    assume(last - now <= before - last)
    sigma = torch.tensor(now, dtype=torch.float64)
    factor = extrapolation_factor(
        sigma,
        torch.tensor([[last]], dtype=torch.float64),
        torch.tensor([[before]], dtype=torch.float64),
    )
    line = lambda t: torch.tensor([[[3.0 * t - 1.0]]], dtype=torch.float64)  # noqa: E731
    predicted = extrapolate(line(last), line(last) - line(before), factor)
    torch.testing.assert_close(predicted, line(now), rtol=1e-6, atol=1e-6)


def test_the_factor_is_capped_and_needs_two_updates():
    last = torch.tensor([[0.5, 0.5, 0.5]])
    previous = torch.tensor([[0.6, 0.9, 0.5]])
    factor = extrapolation_factor(torch.tensor(0.3), last, previous)
    torch.testing.assert_close(factor, torch.tensor([[1.0, 0.5, 0.0]]))


@pytest.mark.parametrize("policy", ["full", "fp8"])
@pytest.mark.parametrize("linear", [True, False])
def test_a_history_equals_what_single_tokens_remember(policy, linear):
    generator = torch.Generator().manual_seed(0)
    rows, length, shape = 2, 9, (3, 4)
    like = torch.zeros(0)
    history = History(rows, length, shape, like, linear=linear, policy=policy)
    last = torch.zeros(rows * length, *shape)
    delta = torch.zeros_like(last)
    for step in range(8):
        x = torch.randn(rows, length, *shape, generator=generator)
        if step in (0, 1, 5):
            history.replace(x)
            flat = x.flatten(0, 1)
            delta, last = flat - last, flat.clone()
            continue
        index = torch.randperm(rows * length, generator=generator)[: rows * 4].sort().values
        factor = torch.rand(rows * length, generator=generator)
        fresh = x.flatten(0, 1)[: rows * 4]
        expected = last + (factor[:, None, None] * delta if linear else 0)
        expected[index] = fresh
        got = history.update(fresh.view(rows, 4, *shape), index, factor).clone()
        torch.testing.assert_close(got.flatten(0, 1)[index], fresh, rtol=0, atol=0)
        loose = {"rtol": 0.13, "atol": 0.12} if policy == "fp8" else {}
        torch.testing.assert_close(got.flatten(0, 1), expected, **loose)
        delta[index] = fresh - last[index]
        last[index] = fresh


def test_a_second_value_at_the_same_noise_level_replaces_the_first():
    history = History(1, 2, (1,), torch.zeros(0), linear=True)
    none, both = torch.zeros(2), torch.ones(2)
    history.replace(torch.tensor([[[1.0], [1.0]]]))
    history.replace(torch.tensor([[[3.0], [3.0]]]), none)
    history.replace(torch.tensor([[[4.0], [4.0]]]), both)
    assert history.delta.read().flatten().tolist() == [3.0, 3.0]
    index, factor = torch.tensor([0]), torch.ones(2)
    full = history.update(torch.tensor([[[9.0]]]), index, factor, both)
    assert full.flatten().tolist() == [9.0, 7.0]
    assert history.delta.read().flatten().tolist() == [8.0, 3.0]


def test_fp8_takes_half_the_memory_and_keeps_three_bits():
    like = torch.zeros(0, dtype=torch.bfloat16)
    full = History(1, 64, (4, 128), like, linear=False)
    small = History(1, 64, (4, 128), like, linear=False, policy="fp8")
    assert small.nbytes / full.nbytes == pytest.approx(132 / 256)
    assert full.nbytes * 2 == 64 * bytes_per_token(4, 128, 2, "full")
    assert small.nbytes * 2 == 64 * bytes_per_token(4, 128, 2, "fp8")
    x = torch.randn(1, 64, 4, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    small.replace(x)
    error = (small.last.read().view_as(x) - x).float().abs()
    assert (error <= x.float().abs() / 16 + x.float().abs().amax(-1, keepdim=True) / 448).all()


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match=r"policy='int4': .*full.*fp8"):
        bytes_per_token(1, 1, 2, "int4")


def test_a_closed_store_passes_through():
    store = KVStore()
    k, v = torch.randn(1, 3, 2, 4), torch.randn(1, 3, 2, 4)
    assert store(k, v) == (k, v)


@given(data=st.data())
def test_the_joint_index_puts_text_image_and_padding_in_their_places(data):
    rows, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    active = data.draw(st.integers(1, tokens))
    starts = data.draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows))
    length = max(starts) + tokens
    index = torch.stack([torch.randperm(tokens)[:active].sort().values for _ in range(rows)])
    joint = joint_index(index, tokens, length, starts)
    assert joint.shape == (rows, length - tokens + active)
    for row, start, places in zip(joint.tolist(), starts, index.tolist(), strict=True):
        image = [start + i for i in places]
        assert row == [*range(start), *image, *range(start + tokens, length)]
