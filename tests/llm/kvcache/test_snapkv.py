"""`snapkv` keeps what the last queries of a prompt attend to, and nothing that was removed comes back."""

import math

import pytest
import torch

from dit_accel.llm.kvcache.part import Part
from dit_accel.llm.kvcache.partial import attention_part
from dit_accel.llm.kvcache.selector import PromptQueries, selector_of
from dit_accel.llm.kvcache.store import store_of

from .turns import answers, prompt_of, queries, read_by_query, tokens

SCALE = 0.5


def kept_by_definition(part, q, count, window, kernel):
    """Return the kept slots by plain loops over rows and heads."""
    rows, heads, group, length, _ = q.shape
    kept = torch.zeros(rows, heads, part.slots, dtype=torch.bool)
    for b in range(rows):
        for h in range(heads):
            total = torch.zeros(part.slots)
            for g in range(group):
                received = torch.zeros(part.slots)
                for i in range(length - window, length):
                    scores = part.k[b, h, : i + 1] @ q[b, h, g, i] * SCALE
                    received[: i + 1] += scores.softmax(0)
                for j in range(part.slots):
                    near = received[max(0, j - kernel // 2) : j + kernel // 2 + 1]
                    total[j] += near.max()
            kept[b, h, total.topk(count).indices] = True
    return kept


@pytest.mark.parametrize(("window", "kernel"), [(1, 1), (16, 7), (60, 3)])
@pytest.mark.parametrize("budget", [9, 0.25])
def test_kept_tokens_are_those_of_the_definition(budget, window, kernel):
    part, q, store = tokens(60), queries(60), store_of("dense")
    options = {"budget": budget, "window": window, "kernel": kernel}
    selector = selector_of("snapkv", options)
    selector.append(store, part, prompt_of(q, part), SCALE)
    seen = kept_by_definition(part, q, 9 if budget == 9 else 15, window, kernel)
    new = queries(2, seed=5)
    (found,), share = selector.attend(store, new, SCALE)
    want = read_by_query(new, part, seen[:, :, None].expand(-1, -1, 2, -1), SCALE)
    torch.testing.assert_close(found, want)
    assert share == pytest.approx(0.15 if budget == 9 else 0.25)


def test_exact_tokens_of_the_prompt_take_their_part_of_the_attention():
    """A query that reads a first token and nothing else must not decide what is kept."""
    part, q = tokens(40, rows=1, heads=1), torch.zeros(1, 1, 1, 42, 8)
    first, last = tokens(1, rows=1, heads=1, seed=2), tokens(1, rows=1, heads=1, seed=3)
    first.k[...] = 0.0
    first.k[..., 0] = 50.0
    part.k[..., 0] = torch.zeros(40)
    part.k[0, 0, 7, 1], part.k[0, 0, 9, 2] = 30.0, 31.0
    q[..., -1, 0], q[..., -1, 1] = 10.0, 1.0  # reads the first token, and token 7 a little
    q[..., -2, 2] = 1.0
    selector, store = (
        selector_of("snapkv", {"budget": 1, "kernel": 1, "window": 2}),
        store_of("dense"),
    )
    selector.append(store, part, PromptQueries(q, first, last), 1.0)
    assert selector.positions.tolist() == [[[9]]]


@pytest.mark.parametrize("removed", [0, 3, 12, 13, 40, 71, 72])
def test_crop_removes_the_right_tokens_of_each_head(removed):
    part, later, store = tokens(60), tokens(12, seed=4), store_of("dense")
    selector = selector_of("snapkv", {"budget": 20})
    selector.append(store, part, prompt_of(queries(60), part), SCALE)
    positions = selector.positions
    selector.append(store, later, None, SCALE)
    other = selector.fork(), store.fork()
    assert selector.crop(store, removed) is None
    seen = torch.zeros(2, 2, 72, dtype=torch.bool)
    seen.scatter_(2, positions, True)
    seen[:, :, 60:] = True
    new, every = queries(1, seed=5), torch.cat([part.k, later.k], 2)
    values = torch.cat([part.v, later.v], 2)

    def check(selector, store, seen):
        (found,), share = selector.attend(store, new, SCALE)
        want = attention_part(new, every, values, scale=SCALE, visible=seen)
        torch.testing.assert_close(found, want)
        return share

    check(*other, seen)
    if removed == 72:
        assert selector.attend(store, new, SCALE) == ([], 0.0)
        return
    seen[:, :, 72 - removed :] = False
    left = seen.float().sum(-1).mean() / (72 - removed)
    assert check(selector, store, seen) == pytest.approx(float(left))


def test_tokens_after_a_deep_crop_are_kept():
    part, later, store = tokens(60), tokens(5, seed=4), store_of("dense")
    selector = selector_of("snapkv", {"budget": 1.0})
    selector.append(store, part, prompt_of(queries(60), part), SCALE)
    selector.crop(store, 45)
    selector.append(store, later, None, SCALE)
    new = queries(2, seed=5)
    (found,), share = selector.attend(store, new, SCALE)
    k, v = (torch.cat([x[:, :, :15], y], 2) for x, y in ((part.k, later.k), (part.v, later.v)))
    torch.testing.assert_close(found, attention_part(new, k, v, scale=SCALE))
    assert share == 1.0


def test_padding_is_kept_last():
    part, q = tokens(60), queries(60)
    valid = torch.ones(2, 1, 60, dtype=torch.bool)
    valid[1, :, :45] = False
    part = Part(part.tensors, 60, valid)
    selector, store = selector_of("snapkv", {"budget": 15}), store_of("dense")
    selector.append(store, part, prompt_of(q, part), SCALE)
    assert (selector.positions[1] >= 45).all()
    (found,), _ = selector.attend(store, queries(1, seed=5), SCALE)
    assert not found.o.isnan().any()


def test_first_question_is_answered_and_later_ones_are_lost():
    """The finding of SCBench (arXiv 2412.10319): dropping is tuned to one question."""
    found = answers({"select": "snapkv"})
    assert found.first == 1.0
    assert found.later <= 0.25
    assert found.read <= 0.2
    window = answers({"select": "none", "recent": 256})
    assert window.first <= 0.4
    assert window.later <= 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget=0"),
        ({"budget": 1.5}, "budget=1.5"),
        ({"budget": -0.1}, "budget=-0.1"),
        ({"budget": math.nan}, "budget=nan"),
        ({"budget": True}, "budget=True"),
        ({"window": 0}, "window=0"),
        ({"kernel": 4}, "kernel=4"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        selector_of("snapkv", options)
