"""`quest` reads the pages whose bounds are largest, and its bounds hold whatever is done to the tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.llm.kvcache import chosen
from dit_accel.llm.kvcache.part import Part
from dit_accel.llm.kvcache.selector import selector_of
from dit_accel.llm.kvcache.selectors.quest import Quest
from dit_accel.llm.kvcache.store import store_of

from .test_exact import OPERATIONS, ZONES, check_operations
from .turns import answers, queries, read_by_query, tokens

SCALE = 0.5


def filled(part, sizes, **options):
    """Return a selector and a store that took the tokens in some at a time."""
    selector, store, at = selector_of("quest", options), store_of("dense"), 0
    for size in sizes:
        selector.append(store, part.cut(at, at + size), None, SCALE)
        at += size
    return selector, store


def pages_by_definition(part, q, count, page):
    """Return the tokens `[B, H, L, n]` of the pages with the largest bounds, by the formula of the paper."""
    weights = []
    for start in range(0, part.slots, page):
        k = part.k[:, :, start : start + page]
        low, high = k.amin(2)[:, :, None, None], k.amax(2)[:, :, None, None]
        weights.append(torch.maximum(q * low, q * high).sum(-1) * SCALE)
    total = torch.stack(weights, -1).softmax(-1).sum(2)
    chosen = torch.zeros_like(total, dtype=torch.bool)
    chosen.scatter_(-1, total.topk(count).indices, True)
    return chosen.repeat_interleave(page, -1)[..., : part.slots]


@pytest.mark.parametrize("sizes", [(50,), (16, 34), (5, 5, 1, 9, 30), (1,) * 50])
@pytest.mark.parametrize(("budget", "pages"), [(0.01, 1), (0.25, 2), (20, 3)])
def test_pages_are_those_of_the_definition(sizes, budget, pages):
    part, q = tokens(50), queries(3)
    selector, store = filled(part, sizes, budget=budget, page=8)
    (found,), share = selector.attend(store, q, SCALE)
    want = read_by_query(q, part, pages_by_definition(part, q, pages, 8), SCALE)
    torch.testing.assert_close(found, want)
    assert share == pytest.approx(pages * 8 / 50)


def test_gathered_keys_stay_small(monkeypatch):
    """Many queries are read some at a time, and find the same."""
    part, q = tokens(50), queries(9)
    selector, store = filled(part, [50], budget=0.5, page=8)
    want = selector.attend(store, q, SCALE)[0][0]
    sizes = []
    monkeypatch.setattr(chosen, "GATHERED", 2 * 2 * 32 * 8 * 2)
    attend_at = store.attend_at
    store.attend_at = lambda q, *more: sizes.append(q.shape[3]) or attend_at(q, *more)
    torch.testing.assert_close(selector.attend(store, q, SCALE)[0][0], want)
    assert sizes == [2, 2, 2, 2, 1]


def test_bounds_hold_after_crops_and_rows():
    part = tokens(50)
    selector, store = filled(part, [50], page=8)
    selector.crop(store, 13)
    more = tokens(9, seed=7)
    selector.append(store, more, None, SCALE)
    index = torch.tensor([1, 0])
    selector.rows(index)
    store.rows(index)
    k = torch.cat([part.k[:, :, :37], more.k], 2)[index]
    for i in range(k.shape[2]):
        assert (selector.low[:, :, i // 8] <= k[:, :, i]).all()
        assert (k[:, :, i] <= selector.high[:, :, i // 8]).all()
    assert selector.low.shape[2] == 6


def test_pages_of_padding_are_read_last():
    part = tokens(48)
    valid = torch.ones(2, 1, 48, dtype=torch.bool)
    valid[1, :, :37] = False
    selector, store = filled(Part(part.tensors, 48, valid), [48], budget=16, page=8)
    q = queries(1)
    (found,), _ = selector.attend(store, q, SCALE)
    seen = torch.zeros(2, 2, 1, 48, dtype=torch.bool)
    seen[1, ..., 37:] = True
    want = read_by_query(q, part, seen, SCALE)
    torch.testing.assert_close(found.o[1], want.o[1])
    assert not found.o.isnan().any()


@settings(max_examples=10, deadline=None)
@given(operations=OPERATIONS, first=st.integers(0, 12), page=st.sampled_from([1, 3, 16]))
def test_choosing_all_pages_is_exact(operations, first, page):
    """The path of chosen tokens gives what dense attention gives, whatever is done to the cache."""
    kv = {**ZONES, "select": "quest", "select_options": {"budget": 1.0, "page": page}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Quest, "reads_all", staticmethod(lambda *_: False))
        check_operations(operations, kv, first)


def test_most_later_questions_are_answered():
    """Keys of the hand-written model are random codes: a page has nothing in common, and its bounds are wide."""
    found = answers("quest")
    assert found.first == 1.0
    assert found.later >= 0.75
    assert found.read <= 0.35


@pytest.mark.parametrize(
    ("options", "message"),
    [({"budget": 0}, "budget=0"), ({"budget": 2.0}, "budget=2.0"), ({"page": 0}, "page=0")],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        selector_of("quest", options)
