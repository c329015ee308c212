"""`wave` reads the best clusters exactly and estimates the next ones, and its clusters always hold the tokens there are."""

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.llm.kvcache.clusters import Clusters
from dit_accel.llm.kvcache.part import Part
from dit_accel.llm.kvcache.partial import attention_part, merged
from dit_accel.llm.kvcache.selector import selector_of
from dit_accel.llm.kvcache.selectors import clusters as wave
from dit_accel.llm.kvcache.selectors.clusters import Wave
from dit_accel.llm.kvcache.spherical_kmeans import cluster_keys
from dit_accel.llm.kvcache.store import store_of

from .test_exact import OPERATIONS, ZONES, check_operations
from .turns import answers, queries, tokens

SCALE = 0.5


def filled(part, sizes, **options):
    """Return a selector and a store that took the tokens in some at a time."""
    selector, store, at = selector_of("wave", options), store_of("dense"), 0
    for size in sizes:
        selector.append(store, part.cut(at, at + size), None, SCALE)
        at += size
    return selector, store


def members(found: Clusters):
    """Return the tokens of each cluster, by row, head and cluster."""
    every = torch.arange(found.count).expand(*found.sizes.shape[:2], 1, -1)
    index, inside, _ = found.members(every.contiguous())
    flat = [x[m].tolist() for x, m in zip(index.flatten(0, 2), inside.flatten(0, 2), strict=True)]
    sizes = found.sizes.flatten(0, 1).tolist()
    lists = []
    for all_tokens, counts in zip(flat, sizes, strict=True):
        lists.append([[all_tokens.pop(0) for _ in range(n)] for n in counts])
        assert not all_tokens
    rows, heads = found.sizes.shape[:2]
    return [lists[b * heads : (b + 1) * heads] for b in range(rows)]


def check_clusters(selector, store, part, real=None):
    """Check that each real token is in one cluster, and that sizes and means are those of the members."""
    for b, row in enumerate(members(selector.clusters)):
        for h, each in enumerate(row):
            every = sorted(chain.from_iterable(each))
            at = torch.arange(part.slots)
            assert every == (at if real is None else at[real[b]]).tolist()
            for i, inside in enumerate(each):
                if not inside:
                    continue
                for mean, x in ((selector.clusters.k, part.k), (selector.clusters.v, part.v)):
                    torch.testing.assert_close(mean[b, h, i], x[b, h, inside].mean(0))


def by_definition(selector, part, q, read, guess):
    """Return the attention of one row, head, query head and position after another."""
    found, out = selector.clusters, torch.zeros(*q.shape[:-1], part.v.shape[-1])
    lists = members(found)
    for b, h, i in ((b, h, i) for b in range(2) for h in range(2) for i in range(q.shape[3])):
        logits = q[b, h, :, i] @ found.k[b, h].mT * SCALE  # [g, m]
        logits[:, found.sizes[b, h] == 0] = -torch.inf
        order = logits.softmax(-1).sum(0).argsort(descending=True)
        exact = list(chain.from_iterable(lists[b][h][c] for c in order[:read].tolist()))
        near = order[read : read + guess]
        for g in range(q.shape[2]):
            scores = part.k[b, h, exact] @ q[b, h, g, i] * SCALE
            means = found.sizes[b, h, near] * torch.exp(logits[g, near])
            top = scores.exp() @ part.v[b, h, exact] + means @ found.v[b, h, near]
            out[b, h, g, i] = top / (scores.exp().sum() + means.sum())
    return out


def test_a_number_of_clusters_is_read_at_least():
    part, q = tokens(320), queries(3)
    few, store = filled(part, (320,), size=8, retrieve=0.05, least=10)
    same, other = filled(part, (320,), size=8, retrieve=0.25)
    found, want = few.attend(store, q, SCALE), same.attend(other, q, SCALE)
    assert found[1] == want[1]
    torch.testing.assert_close(merged(found[0]), merged(want[0]))
    every, store = filled(part, (320,), size=8, retrieve=0.05, least=1000)
    assert every.attend(store, q, SCALE)[1] == 1.0
    none, store = filled(part, (320,), size=8, retrieve=0.0, least=10)
    assert none.attend(store, q, SCALE)[1] == 0.0


@pytest.mark.parametrize("sizes", [(80,), (40, 30, 10), (64, *[1] * 16)])
@pytest.mark.parametrize(("retrieve", "estimate"), [(0.2, 0.3), (0.3, 0.0), (0.0, 0.5), (0.2, 1.0)])
@pytest.mark.parametrize("scores", [2**24, 400])
def test_attention_is_that_of_the_definition(monkeypatch, sizes, retrieve, estimate, scores):
    monkeypatch.setattr(wave, "SCORES", scores)
    part, q = tokens(80), queries(3)
    selector, store = filled(part, sizes, retrieve=retrieve, estimate=estimate, size=8)
    total = selector.clusters.count
    read = round(retrieve * total)
    guess = min(round(estimate * total), total - read)
    parts, share = selector.attend(store, q, SCALE)
    want = by_definition(selector, part, q, read, guess)
    torch.testing.assert_close(merged(parts), want.flatten(1, 2))
    assert (share == 0) == (retrieve == 0)
    assert share < 0.6


def test_clusters_of_one_token_are_estimated_exactly():
    part, q = tokens(40), queries(3)
    selector, store = filled(part, [1] * 40, retrieve=0.0, estimate=1.0)
    parts, share = selector.attend(store, q, SCALE)
    want = merged([attention_part(q, part.k, part.v, scale=SCALE)])
    torch.testing.assert_close(merged(parts), want)
    assert share == 0.0


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 90),
    size=st.integers(1, 20),
    strength=st.floats(0.0, 20.0),
)
def test_estimates_are_lower_bounds(seed, count, size, strength):
    """The weight of a cluster's mean key is at most the mean weight of its keys (Jensen)."""
    part, q = tokens(count, seed=seed), queries(1, seed=seed + 1) * strength
    selector, _ = filled(part, [count], size=size)
    found = selector.clusters
    for b, row in enumerate(members(found)):
        for h, each in enumerate(row):
            for c, inside in enumerate(each):
                if inside:
                    own = (part.k[b, h, inside].double() @ q[b, h, :, 0].double().mT).mul(SCALE)
                    bound = found.k[b, h, c].double() @ q[b, h, :, 0].double().mT * SCALE
                    mean = own.logsumexp(0) - torch.tensor(len(inside)).log()
                    assert (bound <= mean + 1e-4).all()


@pytest.mark.parametrize("sizes", [(100,), (60, 40), (30, 1, 2, 67)])
def test_every_token_is_in_one_cluster(sizes):
    part = tokens(100)
    selector, store = filled(part, sizes, size=7)
    check_clusters(selector, store, part)


@pytest.mark.parametrize("removed", [1, 5, 40, 41, 90, 99])
def test_crops(removed):
    part = tokens(100)
    selector, store = filled(part, (60, 40), size=7)
    fork = selector.fork(), store.fork()
    selector.crop(store, removed)
    check_clusters(selector, store, part.cut(0, 100 - removed))
    check_clusters(*fork, part)
    more = tokens(20, seed=9)
    selector.append(store, more, None, SCALE)
    k, v = (
        torch.cat([x[:, :, : 100 - removed], y], 2) for x, y in ((part.k, more.k), (part.v, more.v))
    )
    check_clusters(selector, store, Part.of(k, v))
    selector.crop(store, store.slots)
    assert selector.clusters is None


def test_padding_belongs_to_no_cluster():
    part, real = tokens(100), torch.ones(2, 100, dtype=torch.bool)
    real[1, :83] = False
    part.k[1, :, :83] = 1e4
    part = Part(part.tensors, 100, real[:, None])
    selector, store = filled(part, [100], size=7, retrieve=0.5)
    check_clusters(selector, store, part, real)
    assert selector.clusters.sizes[1].sum().item() == 2 * 17
    index = torch.tensor([1, 0])
    selector.rows(index)
    store.rows(index)
    parts, _ = selector.attend(store, queries(2), SCALE)
    assert not merged(parts).isnan().any()


def test_rows_without_a_token_give_none():
    part = tokens(40)
    part = Part(part.tensors, 40, torch.zeros(2, 1, 40, dtype=torch.bool))
    for more in ({"estimate": 0.0}, {"retrieve": 0.0}, {}):
        selector, store = filled(part, [40], **more)
        parts, share = selector.attend(store, queries(1), SCALE)
        assert share == 0
        assert all((x.lse == -torch.inf).all() and (x.o == 0).all() for x in parts)


def test_planted_clusters_are_found():
    """Keys around 8 directions: each cluster holds keys of one direction, also where they lie in several segments."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(8, 16, generator=generator)
    kinds = torch.randint(0, 8, (400,), generator=generator)
    k = directions[kinds] + 0.02 * torch.randn(400, 16, generator=generator) + 3.0
    labels, count = cluster_keys(k[None, None], None, size=20, segment=100)
    assert count == 20
    for c in range(count):
        assert len(set(kinds[labels[0, 0] == c].tolist())) <= 1


def test_sizes_are_exact_in_half_precision():
    part = tokens(700, rows=1, heads=1)
    part = Part.of(torch.ones_like(part.k).bfloat16(), part.v.bfloat16())
    selector, _ = filled(part, [700], size=700)
    assert selector.clusters.sizes.tolist() == [[[700]]]


@settings(max_examples=10, deadline=None)
@given(operations=OPERATIONS, first=st.integers(0, 12), size=st.sampled_from([1, 3, 16]))
def test_choosing_all_clusters_is_exact(operations, first, size):
    """The path of chosen tokens gives what dense attention gives, whatever is done to the cache."""
    kv = {**ZONES, "select": "wave", "select_options": {"retrieve": 1.0, "size": size}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Wave, "reads_all", staticmethod(lambda *_: False))
        check_operations(operations, kv, first)


@pytest.mark.parametrize("length", [2_500, 4_000])
def test_questions_are_answered(length):
    kv = {"select": "wave", "select_options": {"retrieve": 0.05, "estimate": 0.2}}
    found = answers(kv, length)
    assert found.first == 1.0
    assert found.later >= 0.99
    assert found.read <= 0.15  # first and last tokens are most of it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retrieve": -0.1}, "retrieve=-0.1"),
        ({"retrieve": 1.5}, "retrieve=1.5"),
        ({"least": -1}, "least=-1"),
        ({"estimate": 2.0}, "estimate=2.0"),
        ({"retrieve": 0.0, "estimate": 0.0}, "retrieve=0, estimate=0"),
        ({"size": 0}, "size=0"),
        ({"segment": 0}, "segment=0"),
        ({"rounds": 0}, "rounds=0"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        selector_of("wave", options)
