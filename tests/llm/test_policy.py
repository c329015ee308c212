"""`Policy` and `real_spans`: which calls are sparse at the edges of each rule, and what is counted for them."""

import pytest
import torch

from dit_accel.config import PrefillConfig
from dit_accel.llm.padding import real_spans
from dit_accel.llm.policy import KEPT_PLANS, Policy


def policy(**changes) -> Policy:
    settings = {"pattern": "triangle", "options": {"sink": 0, "window": 1}, "block": 16}
    settings |= {"tail": 0, "dense_layers": 0, "crossover": 0, **changes}
    return Policy(PrefillConfig(**settings), 1)


def attend(policy, q_len=100, kv_len=100, *, mask=None, window=None, batch=2):
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, h, n, 8, generator=g) for h, n in ((4, q_len), (2, kv_len), (2, kv_len))
    )
    options = {"scale": 0.3, "causal": True, "softcap": None, "dropout": 0.0}
    return policy.attend(0, q, k, v, mask, window=window, **options)


def density(*lengths, **options) -> float:
    made = policy()
    attend(made, *lengths, **options)
    found = made.counts[0].density
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("lengths", "window", "settings", "reason"),
    [
        ((1, 100), None, {}, "decode"),
        ((2, 100), None, {}, None),
        ((100, 100), None, {"crossover": 101}, "short prompt"),
        ((100, 100), None, {"crossover": 100}, None),
        ((20, 100), None, {"crossover": 100}, None),
        ((100, 100), 50, {"crossover": 101}, "short prompt"),
        ((100, 100), None, {"dense_layers": 1}, "dense layer"),
        ((100, 100), 100, {"dense_layers": 1}, "dense layer"),
        ((100, 100), 99, {"dense_layers": 1}, None),
        ((20, 100), 50, {"dense_layers": 1}, None),
    ],
)
def test_which_calls_are_sparse(lengths, window, settings, reason):
    made = policy(**settings)
    attend(made, *lengths, window=window)
    counts = made.counts[0]
    assert counts.dense == ({} if reason is None else {reason: 1})
    assert counts.sparse == (reason is None)


def test_the_measured_crossover():
    q = torch.zeros(1)
    assert policy(crossover="auto")._crossover(q) == 4096
    assert policy(crossover=7)._crossover(q) == 7


def mask_of(*spans, length=100):
    at = torch.arange(length)
    return torch.stack([(at >= start) & (at < stop) for start, stop in spans])


@pytest.mark.parametrize("window", [None, 30])
def test_the_density_of_a_padded_batch_is_the_mean_of_its_rows(window):
    made = policy()
    attend(made, mask=mask_of((0, 100), (36, 100), (0, 80), (36, 100)), window=window, batch=4)
    rows = [density(n, n, window=window) for n in (100, 64, 80, 64)]
    assert made.counts[0].sparse == 1
    assert made.counts[0].density == pytest.approx(sum(rows) / 4)


def test_counting_does_not_depend_on_when_one_looks():
    made = policy()
    for n in range(KEPT_PLANS + 3):
        attend(made)
        if n % 4 == 0:
            assert made.counts[0].density == pytest.approx(density())
    assert made.counts[0].density == pytest.approx(density())
    assert made.counts[0].sparse == KEPT_PLANS + 3
    assert len(made.counts[0].plans) <= KEPT_PLANS


def test_the_spans_of_a_mask_are_not_used_for_another_one():
    made = policy()
    first, second = mask_of((0, 100), (50, 100)), mask_of((20, 100), (0, 100))
    attend(made, mask=first)
    out = attend(made, mask=second)
    torch.testing.assert_close(out, attend(policy(), mask=second))
    assert not out[0, :, :20].any()
    assert out[0, :, 20:].any(-1).all()
    assert out[1].any(-1).all()


def test_rows_are_grouped_by_their_spans():
    mask = mask_of((0, 9), (3, 9), (0, 0), (8, 9), (0, 1), (3, 9), (2, 7), length=9)
    expected = {(0, 9): [0], (3, 9): [1, 5], (0, 0): [2], (8, 9): [3], (0, 1): [4], (2, 7): [6]}
    assert real_spans(mask) == expected
    mask[6, 4] = False
    assert real_spans(mask) is None


def test_rows_without_a_token_give_zeros():
    out = attend(policy(), mask=mask_of((0, 100), (0, 0)))
    assert out[0].any(-1).all()
    assert not out[1].any()


@pytest.mark.parametrize("q_len", [2, 40])
def test_a_chunk_without_real_queries_gives_zeros(q_len):
    """Padding on the right: the second row ends before the chunk begins."""
    out = attend(policy(), q_len, 100, mask=mask_of((0, 100), (0, 60)))
    assert out[0].any(-1).all()
    assert not out[1].any()
