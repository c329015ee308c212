"""Score kernel against the reference implementation in torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.kernels.router import pooling
from dit_accel.kernels.router import scores as router
from dit_accel.kernels.router.scores_kernel import scores_launch

from .cases import cases


def pooled(batch, heads, group, n_q, n_k, d, seed):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads * group, n_q, d, generator=g)
    k = torch.randn(batch, heads, n_k, d, generator=g) + 2
    squares = q.square() + torch.rand(q.shape, generator=g), k.square() - 0.1
    squares[1].add_(torch.rand(k.shape, generator=g) * 4)  # now and then below the squared mean
    return q, k, squares, k.mean(2, keepdim=True)


def launched(q, k, squares, mean, scale, block_k):
    out = torch.full((*q.shape[:3], k.shape[2]), torch.nan)
    scores_launch(q, k, squares, mean, out, scale=scale, block_k=block_k)()
    return out


def rounding(q, k, squares, mean, scale):
    """Return the allowed error of each score, from the magnitudes of its terms, because sums have another order."""
    keys = k if mean is None else k - mean
    magnitude = router._products(q.abs() * abs(scale), keys.abs())
    if squares is not None:
        variance = (squares[1] - k.square()).clamp(min=0)
        magnitude = magnitude + router._products(squares[0] * scale**2, variance)
    return 1e-6 * (1 + magnitude)


def test_the_allowed_error_is_too_small_for_tf32():
    q, k, *_ = pooled(1, 2, 2, 30, 40, 128, seed=0)
    tf32 = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (q, k)]  # 10 bits are left
    error = router._scores_in_torch(*tf32, None, None, 1.0, 16)
    error = (error - router._scores_in_torch(q, k, None, None, 1.0, 16)).abs()
    assert (error > rounding(q, k, None, None, 1.0)).float().mean() > 0.9


@settings(max_examples=cases(8, 10), deadline=None)
@given(
    batch=st.integers(1, 2), heads=st.integers(1, 2), group=st.integers(1, 3),
    n_q=st.integers(1, 90), n_k=st.integers(1, 140), d=st.sampled_from([1, 24, 64, 72, 128]),
    spread=st.booleans(), smooth=st.booleans(), scale=st.sampled_from([0.3, 1.0, -0.1]),
    block_k=st.sampled_from([1, 16, 64]), seed=st.integers(0, 99),
)  # fmt: skip
def test_scores_equal_the_formulas(
    batch, heads, group, n_q, n_k, d, spread, smooth, scale, block_k, seed
):
    q, k, squares, mean = pooled(batch, heads, group, n_q, n_k, d, seed)
    given_squares, given_mean = squares if spread else None, mean if smooth else None
    expected = router._scores_in_torch(q, k, given_squares, given_mean, scale, block_k)
    actual = launched(q, k, given_squares, given_mean, scale, block_k)
    allowed = rounding(q, k, given_squares, given_mean, scale)
    assert ((actual - expected).abs() <= allowed).all()
    assert torch.equal(actual, launched(q, k, given_squares, given_mean, scale, block_k))


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("smooth_k", [False, True])
@pytest.mark.parametrize("sized", [False, True])
def test_the_operator_takes_the_kernels_on_a_gpu(spread, smooth_k, sized, monkeypatch):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 100, 4, 24, generator=g).transpose(1, 2)
    k = torch.randn(2, 75, 2, 24, generator=g).transpose(1, 2)
    options = {"block_q": 32, "block_k": 16, "spread": spread, "smooth_k": smooth_k}
    if sized:
        options["q_sizes"] = torch.tensor([[32, 7, 0, 4]])
        options["k_sizes"] = torch.tensor([[16, 16, 3, 0, 11], [16, 1, 16, 16, 0]])
    expected = router.block_scores(q, k, **options)
    for module in (router, pooling):
        monkeypatch.setattr(module, "runs_here", lambda x: True)
    torch.testing.assert_close(router.block_scores(q, k, **options), expected, rtol=1e-5, atol=1e-5)
