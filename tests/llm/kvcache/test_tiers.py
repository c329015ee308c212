"""Stored tokens may lie in memory of the CPU or in files, and nothing changes; clusters that are read again stay near."""

import contextlib
import math
import os
import resource
import shutil
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel import llm
from dit_accel.llm.kvcache.blocks import BlockCache
from dit_accel.llm.kvcache.cache import KVCache
from dit_accel.llm.kvcache.partial import merged
from dit_accel.llm.kvcache.selector import selector_of
from dit_accel.llm.kvcache.store import store_of
from dit_accel.llm.kvcache.tiers import tier_of

from ..models import make, prompt
from .test_exact import OPERATIONS, ZONES, check_operations, step
from .turns import queries, tokens

SCALE = 0.5
SELECTORS = {
    "all": {},
    "snapkv": {"budget": 1.0},
    "quest": {"budget": 1.0},
    "wave": {"retrieve": 1.0},
    "retrieval": {"topk": 1.0},
}
linux = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")


@contextlib.contextmanager
def no_room(size: int = 1000):
    """Context manager in which no file grows beyond some bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def mapped_files(folder) -> int:
    """Return the number of files of a folder that this process maps."""
    with open("/proc/self/maps") as file:
        return len({x.split()[4] for x in file if str(folder) in x})


@pytest.mark.parametrize("select", SELECTORS)
@pytest.mark.parametrize("tier", ["cpu", "disk"])
@settings(max_examples=3, deadline=None)
@given(operations=OPERATIONS, first=st.integers(0, 12))
def test_crops_rows_and_forks_in_any_order(tier, select, operations, first):
    kv = {**ZONES, "tier": tier, "select": select, "select_options": SELECTORS[select]}
    check_operations(operations, kv, first)


@linux
def test_files_have_no_name_and_go_with_the_cache(tmp_path):
    model, kv = make("Llama"), {**ZONES, "tier": "disk", "folder": str(tmp_path)}
    llm.enable(model, kv=kv)
    cache = KVCache(model, kv)
    step(model, prompt(), cache)
    assert not list(tmp_path.iterdir())
    assert mapped_files(tmp_path) == 3 * 2  # keys and values of each layer
    fork = cache.fork()
    assert mapped_files(tmp_path) == 3 * 2
    del cache
    step(model, prompt(length=1), fork)
    fork.reset()
    assert mapped_files(tmp_path) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_come_back(tmp_path, dtype):
    store, part = store_of("dense"), tokens(3000)
    store.tier = tier_of("disk", str(tmp_path))
    part = type(part).of(part.k.to(dtype), part.v.to(dtype))
    for at in range(0, 3000, 500):
        store.append(part.cut(at, at + 500))
    found = store.cut(0, 3000)
    assert torch.equal(found.k, part.k)
    assert torch.equal(found.v, part.v)
    index = torch.randint(0, 3000, (2, 2, 50))
    torch.testing.assert_close(store.take(index).k, part.take(index).k)


@pytest.mark.parametrize("what", ["full disk", "no folder"])
def test_what_cannot_be_written_is_refused_and_nothing_is_lost(tmp_path, what):
    folder = tmp_path / "kv"
    folder.mkdir()
    model, kv = make("Llama"), {**ZONES, "tier": "disk", "folder": str(folder)}
    ids = prompt(length=1100)
    want = model(ids).logits[:, 1050:]
    llm.enable(model, kv=kv)
    cache = KVCache(model, kv)
    step(model, ids[:, :30], cache)
    for at in range(30, 1050, 60):
        step(model, ids[:, at : at + 60], cache)
    if what == "no folder":
        shutil.rmtree(folder)
    tail = torch.cat([ids[:, 1050:], ids[:, :40]], 1)
    length = cache.get_seq_length()
    assert length == 1050
    refused = no_room() if what == "full disk" else contextlib.nullcontext()
    with refused, pytest.raises(OSError, match=r"folder=.*bytes"):
        step(model, tail, cache)
    for layer in cache.layers:  # the first layer has read the new tokens, the others have not
        layer.crop(length - layer.length)
    assert cache.get_seq_length() == length
    other = cache.fork()
    for layer in other.layers:
        layer.flush = 1000  # nothing to write
    found = step(model, ids[:, 1050:], other)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_folders_are_checked_before_anything_runs(tmp_path):
    model = make("Llama")
    for kv, message in (
        ({"tier": "mush"}, "tier='mush'"),
        ({"tier": "disk", "folder": str(tmp_path / "none")}, "folder=.*none"),
        ({"folder": str(tmp_path)}, 'folder=.*tier="disk"'),
        ({"select": "wave", "select_options": {"cached": 2.0}}, "cached=2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.enable(model, kv=kv)


class Oracle:
    """Least recently used clusters, by a list of calls."""

    def __init__(self, capacity):
        self.kept, self.capacity, self.hits, self.misses = OrderedDict(), capacity, 0, 0

    def read(self, places):
        new = [x for x in places if x not in self.kept]
        for x in places:
            if x not in new:
                self.kept.move_to_end(x)
        self.hits += len(places) - len(new)
        self.misses += len(new)
        for x in new:
            self.kept[x] = None
        while len(self.kept) > self.capacity:
            self.kept.popitem(last=False)


@settings(max_examples=12, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    cached=st.sampled_from([0.05, 0.2, 0.6, 1.0]),
    tier=st.sampled_from(["device", "disk"]),
)
def test_cached_clusters_change_nothing_and_are_those_read_last(seeds, cached, tier):
    options = {"retrieve": 0.2, "estimate": 0.2, "size": 5}
    plain = selector_of("wave", options)
    selector = selector_of("wave", {**options, "cached": cached})
    part, stores = tokens(100), [store_of("dense"), store_of("dense")]
    stores[1].tier = tier_of(tier, None)
    for x, store in zip((plain, selector), stores, strict=True):
        x.append(store, part, None, SCALE)
    oracle = Oracle(math.ceil(cached * 20) * 4)
    for seed in seeds:
        q = queries(1, seed=seed)
        want, share = plain.attend(stores[0], q, SCALE)
        found, again = selector.attend(stores[1], q, SCALE)
        torch.testing.assert_close(merged(found), merged(want))
        assert share == again
        best, _ = selector._zones(q, 4, 4, SCALE)
        sizes = selector.clusters.sizes
        oracle.read(
            [
                (b, h, c)
                for b in range(2)
                for h in range(2)
                for c in best[b, h, 0].tolist()
                if sizes[b, h, c]
            ]
        )
    blocks = selector.blocks
    assert (blocks.hits, blocks.misses) == (oracle.hits, oracle.misses)
    assert list(blocks.blocks) == list(oracle.kept)


def test_cached_clusters_after_new_tokens_crops_rows_and_forks():
    options = {"retrieve": 0.3, "size": 5}
    plain = selector_of("wave", options)
    selector = selector_of("wave", {**options, "cached": 1.0})
    stores = [store_of("dense"), store_of("dense")]

    def both(act):
        for x, store in zip((plain, selector), stores, strict=True):
            act(x, store)
        for seed in (1, 2, 1):
            q = queries(1, seed=seed)
            want, found = (
                x.attend(s, q, SCALE)[0] for x, s in zip((plain, selector), stores, strict=True)
            )
            torch.testing.assert_close(merged(found), merged(want))

    both(lambda x, s: x.append(s, tokens(100), None, SCALE))
    hits = selector.blocks.hits
    assert hits > 0
    assert selector.nbytes > plain.nbytes
    fork = selector.fork()
    both(lambda x, s: x.append(s, tokens(30, seed=3), None, SCALE))
    assert not set(selector.blocks.blocks) <= set(fork.blocks.blocks)
    both(lambda x, s: x.crop(s, 50))
    both(lambda x, s: x.append(s, tokens(40, seed=4), None, SCALE))
    index = torch.tensor([1, 0])
    both(lambda x, s: (x.rows(index), s.rows(index)))
    selector.clear()
    assert selector.blocks == BlockCache()
