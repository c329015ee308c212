"""`retrieval` reads the keys with the largest scores; graphs find most of them where queries are unlike keys."""

import importlib.util
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.bench.kv_search import found_share, unlike_keys
from dit_accel.llm.kvcache.graphs import KeyIndex, index_of
from dit_accel.llm.kvcache.part import Part
from dit_accel.llm.kvcache.partial import attention_part
from dit_accel.llm.kvcache.projection import near_keys, projected_graph
from dit_accel.llm.kvcache.selector import selector_of
from dit_accel.llm.kvcache.selectors import graph as retrieval
from dit_accel.llm.kvcache.selectors.graph import Retrieval
from dit_accel.llm.kvcache.store import store_of

from .test_exact import OPERATIONS, ZONES, check_operations
from .turns import answers, prompt_of, queries, tokens

SCALE = 0.5
FAISS = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="needs faiss")
KINDS = ["graph", pytest.param("hnsw", marks=FAISS), pytest.param("nsg", marks=FAISS)]


def best_by_definition(q, part, count, real=None):
    """Return attention in which each query head and position reads the keys with the largest scores."""
    o, lse = [], []
    for g in range(q.shape[2]):
        for i in range(q.shape[3]):
            one = q[:, :, g : g + 1, i : i + 1]
            scores = (one.flatten(2, 3) @ part.k.mT)[:, :, 0]
            if real is not None:
                scores = scores.masked_fill(~real, -torch.inf)
            seen = torch.zeros_like(scores, dtype=torch.bool)
            seen.scatter_(2, scores.topk(count).indices, True)
            found = attention_part(one, part.k, part.v, scale=SCALE, visible=seen)
            o.append(found.o[:, :, 0, 0])
            lse.append(found.lse[:, :, 0, 0])
    shape = q.shape[2:4]
    return torch.stack(o, 2).unflatten(2, shape), torch.stack(lse, 2).unflatten(2, shape)


@pytest.mark.parametrize("sizes", [(80,), (40, 30, 10)])
@pytest.mark.parametrize("topk", [7, 0.25])
@pytest.mark.parametrize("chunk", [4096, 16])
def test_flat_finds_the_best_keys(monkeypatch, sizes, topk, chunk):
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    monkeypatch.setattr(retrieval, "SCORES", 2 * 2 * chunk * 4)
    part, q, store, at = tokens(80), queries(3), store_of("dense"), 0
    selector = selector_of("retrieval", {"topk": topk})
    for size in sizes:
        selector.append(store, part.cut(at, at + size), None, SCALE)
        at += size
    (found,), share = selector.attend(store, q, SCALE)
    count = 7 if topk == 7 else 20
    o, lse = best_by_definition(q, part, count)
    torch.testing.assert_close(found.o, o)
    torch.testing.assert_close(found.lse, lse)
    assert share == count / 80
    assert selector.scanned == 1.0


def recall(kind, width):
    """Return the share of the 16 best keys that an index finds, and the share of the keys that it compares."""
    k, seen, new = unlike_keys()
    index = index_of(kind, k, torch.arange(len(k)), seen, 32)
    best = (new @ k.mT).topk(16).indices
    found, products, compared = index.search(new, 16, width)
    assert found.shape == (50, 16)
    torch.testing.assert_close(products, (new[:, None] * k[found]).sum(-1))
    return found_share(found, best), compared


def test_links_of_the_prompt_find_more_and_compare_less():
    found, compared = recall("graph", 32)
    assert found >= 0.98
    assert compared <= 0.2


@FAISS
def test_near_keys_lead_astray():
    """The finding of the paper: graphs of near keys must compare many keys. faiss prunes the links of "nsg"."""
    found, compared = recall("hnsw", 32)
    assert found <= 0.7
    assert compared >= 0.05
    more, many = recall("hnsw", 256)
    assert more > found
    assert many >= 0.3
    found, compared = recall("nsg", 32)
    assert found <= 0.7
    assert compared is None


def test_near_keys_are_found_in_leaves():
    """All of them in one leaf, most of them in leaves of two trees."""
    for n, least in ((500, 1.0), (3000, 0.7)):
        k = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
        near = near_keys(k, 9)
        assert near.shape == (n, 9)
        assert torch.equal(near[:, 0], torch.arange(n))
        assert all(len(set(row)) == 9 for row in near.tolist())
        exact = torch.cdist(k, k).topk(9, largest=False).indices
        assert found_share(near, exact) >= least


def test_neighbours_are_other_keys_each_once_and_all_keys_are_reached():
    k, seen, _ = unlike_keys(600)
    graph, entries = projected_graph(seen, k, 16)
    assert graph.shape == (600, 16)
    for i, row in enumerate(graph.tolist()):
        assert len({*row, i}) == 17
        assert min(row) >= 0
    assert len(graph.unique()) == 600
    assert len(entries.unique()) == 32


def test_each_query_links_the_keys_that_it_shares():
    """Two keys far from each other that answer the same queries are neighbours."""
    k = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    k[10], k[200] = torch.tensor([10.0] + [9.0] * 7), torch.tensor([10.0] + [-9.0] * 7)
    q = torch.zeros(20, 8)
    q[:, 0] = 1.0
    graph, entries = projected_graph(q, k, 8)
    assert 200 in graph[10]
    assert 10 in graph[200]
    assert entries[0] in (10, 200)


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_give_the_best_keys_of_a_prompt_and_of_later_tokens(kind):
    """Wide searches find all; keys after the prompt are compared one by one."""
    part, later, q = tokens(300), tokens(20, seed=5), queries(4)
    real = torch.ones(2, 1, 300, dtype=torch.bool)
    real[1, :, :20] = False
    selector = selector_of("retrieval", {"index": kind, "topk": 9, "width": 300})
    store = store_of("dense")
    part = Part(part.tensors, 300, real)
    selector.append(store, part, prompt_of(queries(300, seed=3), part), SCALE)
    assert selector.built == 300
    selector.append(store, later, None, SCALE)
    assert selector.built == 300
    (found,), share = selector.attend(store, q, SCALE)
    k, v = (torch.cat([x, y], 2) for x, y in ((part.k, later.k), (part.v, later.v)))
    seen = torch.cat([real, torch.ones(2, 1, 20, dtype=torch.bool)], 2)
    o, lse = best_by_definition(q, Part.of(k, v), 9, seen)
    close = torch.isclose(found.lse, lse, atol=1e-5).float().mean()
    assert close >= 0.95
    assert share == 9 / 320
    assert (selector.scanned is None) == (kind == "nsg")
    fork = selector.fork(), store.fork()
    selector.crop(store, 21)
    assert selector.built == 0
    (found,), _ = selector.attend(store, q, SCALE)
    o, lse = best_by_definition(q, Part.of(k[:, :, :299], v[:, :, :299]), 9, seen[..., :299])
    torch.testing.assert_close(found.o, o)
    assert fork[0].built == 300
    fork[0].rows(torch.tensor([1, 0]))
    fork[1].rows(torch.tensor([1, 0]))
    (found,), _ = fork[0].attend(fork[1], q[[1, 0]], SCALE)
    _, lse = best_by_definition(q, Part.of(k, v), 9, seen)
    assert torch.isclose(found.lse[[1, 0]], lse, atol=1e-5).float().mean() >= 0.95


def test_a_graph_is_built_anew_when_the_text_has_doubled():
    selector, store = selector_of("retrieval", {"index": "graph", "rebuild": 300}), None
    store, part = store_of("dense"), tokens(400)
    selector.append(store, part, prompt_of(queries(400, seed=3), part), SCALE)
    for _ in range(3):
        selector.append(store, tokens(100), None, SCALE)
        assert selector.built == 400
    selector.append(store, tokens(100), None, SCALE)
    assert selector.built == 800
    assert selector.nbytes > 0


@settings(max_examples=10, deadline=None)
@given(operations=OPERATIONS, first=st.integers(0, 12), index=st.sampled_from(["flat", "graph"]))
def test_choosing_all_tokens_is_exact(operations, first, index):
    """Indexes that find all keys give what dense attention gives, whatever is done to the cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Retrieval, "reads_all", staticmethod(lambda *_: False))
        patch.setattr(retrieval, "LEAST", 8)
        patch.setattr(retrieval, "index_of", lambda kind, keys, slots, *_: KeyIndex(keys, slots))
        options = {"index": index, "topk": 1.0, "degree": 4, "rebuild": 10}
        check_operations(
            operations, {**ZONES, "select": "retrieval", "select_options": options}, first
        )


def test_later_questions_are_answered():
    found = answers("retrieval")
    assert found.first == 1.0
    assert found.later >= 0.99
    assert found.read <= 0.2


def test_a_graph_answers_most_later_questions():
    """Keys that no query of the prompt asked for are linked less well."""
    options = {"index": "graph", "topk": 32, "width": 64}
    found = answers({"select": "retrieval", "select_options": options}, prompts=2)
    assert found.first == 1.0
    assert found.later >= 0.85


def test_faiss_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    for kind in ("hnsw", "nsg"):
        with pytest.raises(ValueError, match=f"index={kind!r}.*faiss-cpu"):
            selector_of("retrieval", {"index": kind})
    assert selector_of("retrieval", {"index": "graph"}).index == "graph"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index": "mush"}, "index='mush'.*flat, graph, hnsw, nsg"),
        ({"topk": 0}, "topk=0"),
        ({"topk": 1.5}, "topk=1.5"),
        ({"degree": 2}, "degree=2"),
        ({"degree": 300}, "degree=300"),
        ({"width": 0}, "width=0"),
        ({"rebuild": 10}, "rebuild=10"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        selector_of("retrieval", options)
