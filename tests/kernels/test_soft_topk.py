"""Soft top-k: row sums, its limit, and its gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.kernels.router import soft_topk


@st.composite
def rows(draw, dtype=torch.float64, most=40):
    n = draw(st.integers(1, most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    loud = draw(st.sampled_from([0.01, 1.0, 30.0]))
    scores = loud * torch.randn(2, 3, n, generator=generator, dtype=dtype)
    if draw(st.booleans()):  # ties
        scores = scores.round()
    if draw(st.booleans()):
        return scores, draw(st.integers(1, n + 2))
    return scores, torch.randint(1, n + 2, (2, 3, 1), generator=generator)


@given(inputs=rows(), temperature=st.sampled_from([0.01, 0.1, 1.0, 50.0]))
def test_weights_are_shares_that_sum_to_the_count(inputs, temperature):
    scores, count = inputs
    weights = soft_topk(scores, count, temperature=temperature)
    assert (weights >= 0).all()
    assert (weights <= 1).all()
    goal = torch.as_tensor(count, dtype=scores.dtype).clamp(max=scores.shape[-1])
    goal = goal.expand(2, 3, 1)[..., 0]
    torch.testing.assert_close(weights.sum(-1), goal, rtol=1e-9, atol=1e-9)
    # Better scores weigh no less.
    ranked = weights.gather(-1, scores.argsort(-1))
    assert (ranked.diff(dim=-1) >= -1e-12).all()


@given(inputs=rows(torch.float32), temperature=st.sampled_from([0.1, 1.0]))
def test_single_precision_sums_to_the_count_as_well(inputs, temperature):
    scores, count = inputs
    weights = soft_topk(scores, count, temperature=temperature)
    goal = torch.as_tensor(count, dtype=torch.float32).clamp(max=scores.shape[-1])
    torch.testing.assert_close(weights.sum(-1), goal.expand(2, 3, 1)[..., 0], rtol=1e-4, atol=1e-4)


def test_a_low_temperature_is_the_hard_choice(generator):
    scores = torch.randn(5, 20, generator=generator)
    weights = soft_topk(scores, 4, temperature=1e-4)
    hard = torch.zeros_like(scores).scatter_(-1, scores.topk(4).indices, 1.0)
    torch.testing.assert_close(weights, hard, rtol=0, atol=1e-3)


def test_a_shift_of_all_scores_changes_nothing(generator):
    scores = torch.randn(5, 20, generator=generator, dtype=torch.float64)
    expected = soft_topk(scores, 4, temperature=0.3)
    torch.testing.assert_close(soft_topk(scores + 7, 4, temperature=0.3), expected)


@settings(max_examples=15)
@given(inputs=rows(most=10), temperature=st.sampled_from([0.5, 2.0]))
def test_gradients_are_those_of_the_weights(inputs, temperature):
    scores, count = inputs
    scores = (scores / scores.abs().max().clamp(min=1)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: soft_topk(x, count, temperature=temperature), (scores,)
    )


def test_a_row_that_keeps_everything_has_ones_and_no_gradient(generator):
    scores = torch.randn(3, 5, generator=generator, requires_grad=True)
    weights = soft_topk(scores, torch.tensor([[5], [7], [2]]), temperature=0.1)
    weights.square().sum().backward()
    assert (weights[:2] == 1).all()
    assert not scores.grad[:2].any()
    assert scores.grad[2].any()
    assert scores.grad[2].sum().abs() < 1e-5  # the sum is fixed


def test_scores_far_apart_leave_finite_gradients():
    scores = torch.tensor([[900.0, 300.0, -5000.0, 0.0]], requires_grad=True)
    weights = soft_topk(scores, 2, temperature=0.1)
    weights.sum().backward()
    torch.testing.assert_close(weights.detach(), torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 2, "temperature": 0.0}, "temperature=0.0"),
        ({"count": 0, "temperature": 1.0}, "count=0"),
    ],
)
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        soft_topk(torch.zeros(2, 3), **options)
