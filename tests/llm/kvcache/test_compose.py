"""Each store with each selector, in memory of each kind: what docs/kvcache.md says can be combined."""

import json

import pytest
import torch

from dit_accel import llm
from dit_accel.llm.control import attention_layers
from dit_accel.llm.kvcache.cache import KVCache, model_sizes
from dit_accel.llm.kvcache.codebooks import write_codebooks
from dit_accel.llm.kvcache.model_file import ModelFile, fingerprint_of
from dit_accel.llm.kvcache.selector import PACKAGE as SELECTORS
from dit_accel.llm.kvcache.selector import Selector
from dit_accel.llm.kvcache.store import PACKAGE as STORE_MODULES
from dit_accel.llm.kvcache.store import Store
from dit_accel.llm.kvcache.stores.channels import KIND
from dit_accel.llm.plugins import classes_in

from ..models import make, prompt
from .test_channels import mask_of
from .test_codes import codebooks

ZONES = {"sink": 4, "recent": 8, "flush": 8}
FULL = {
    "all": {},
    "snapkv": {"budget": 1.0},
    "quest": {"budget": 1.0},
    "wave": {"retrieve": 1.0},
    "retrieval": {"topk": 1.0},
}
"""Options with which a selector reads every token."""
STORES = [
    "dense",
    "int",
    "pq",
    "pq, keys before RoPE",
    "channels",
    "channels_pq",
    "channels_pq, keys before RoPE",
]
SOME = {
    "none": {},
    "snapkv": {"budget": 0.3, "window": 8},
    "quest": {"budget": 0.3, "page": 4},
    "wave": {"retrieve": 0.2, "estimate": 0.3},
    "retrieval": {"topk": 8},
}


@pytest.fixture(scope="module")
def model():
    return make("Llama")


@pytest.fixture(scope="module")
def options(model, tmp_path_factory):
    """Settings of each store."""
    folder = tmp_path_factory.mktemp("files")
    sizes, print_ = model_sizes(model.config), fingerprint_of(attention_layers(model))
    mask, codes = str(folder / "mask.safetensors"), str(folder / "pq.safetensors")
    kept = mask_of(8, 16)
    kept[1] = mask_of(0, 16)[1]  # a head without stored keys
    ModelFile(KIND, {"mask": kept}, sizes, print_).save(folder / "mask.safetensors")
    write_codebooks(codes, codebooks(sizes))
    unrotated = str(folder / "before.safetensors")
    write_codebooks(unrotated, codebooks(sizes, pairing="planes", rope="before", centred=True))
    found = {
        "dense": {},
        "int": {"bits": 4, "group": 8},
        "pq": {"codebooks": codes},
        "pq, keys before RoPE": {"codebooks": unrotated},
        "channels": {"mask": mask},
        "channels_pq": {"mask": mask, "codebooks": codes},
        "channels_pq, keys before RoPE": {"mask": mask, "codebooks": unrotated},
    }
    return {k: {"store": k.split(",")[0], "store_options": x} for k, x in found.items()}


def outputs(model, kv, length=70):
    """Return logits of a padded batch that is read in two turns, cropped, and read on in a fork."""
    ids = prompt(length=length)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    llm.enable(model, kv=kv)
    cache, found = KVCache(model, kv), []

    def read(cache, start, stop):
        given = {
            "attention_mask": mask[:, :stop],
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, start:stop],
        }
        with torch.no_grad():
            logits = model(ids[:, start:stop], past_key_values=cache, **given).logits
        found.append(torch.where(mask[:, start:stop, None] > 0, logits, 0.0))

    read(cache, 0, 50)
    for start in (50, 51, 52):
        read(cache, start, start + 1)
    read(cache, 53, 62)
    cache.crop(-20)
    read(cache.fork(), 42, 50)
    read(cache, 42, 60)
    llm.disable(model)
    return torch.cat(found, 1), cache


@pytest.fixture(scope="module")
def expected(model):
    """`expected(kv)`: the logits of `outputs`, computed once for settings that several tests compare with."""
    known = {}

    def call(kv):
        key = json.dumps(kv, sort_keys=True)
        if key not in known:
            known[key] = outputs(model, kv)[0]
        return known[key]

    return call


def test_every_store_and_selector_is_here(options):
    assert list(options) == STORES
    assert {x["store"] for x in options.values()} == set(classes_in(STORE_MODULES, Store))
    assert set(FULL) | set(SOME) == set(classes_in(SELECTORS, Selector))


@pytest.mark.parametrize("select", FULL)
@pytest.mark.parametrize("store", STORES)
def test_a_selector_that_reads_everything_changes_nothing(model, options, expected, store, select):
    common = {**ZONES, **options[store]}
    want = expected(common)
    found, cache = outputs(model, {**common, "select": select, "select_options": FULL[select]})
    torch.testing.assert_close(found, want, rtol=2e-4, atol=2e-4)
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("select", [*FULL, "none"])
@pytest.mark.parametrize("store", STORES)
def test_a_selector_reads_less_and_caches_come_back_from_files(
    model, options, store, select, tmp_path
):
    kv = {**ZONES, **options[store], "select": select}
    kv["select_options"] = SOME.get(select, {})
    found, cache = outputs(model, kv)
    assert found.isfinite().all()
    if select in SOME:
        assert cache.read_share < 0.95
    llm.enable(model, kv=kv)
    llm.save_cache(model, cache, tmp_path / "cache.safetensors")
    again = llm.load_cache(model, tmp_path / "cache.safetensors")
    assert again.nbytes == cache.nbytes
    ids = prompt(length=5, seed=3)
    mask = torch.ones(2, 65, dtype=torch.long)
    mask[1, :5] = 0
    with torch.no_grad():
        found, want = (
            model(ids, past_key_values=x, attention_mask=mask).logits for x in (again, cache)
        )
    torch.testing.assert_close(found, want)
    llm.disable(model)


@pytest.mark.parametrize("tier", ["cpu", "disk"])
@pytest.mark.parametrize("store", STORES)
def test_tokens_in_slower_memory(model, options, expected, store, tier, tmp_path):
    kv = {**ZONES, **options[store], "select": "wave"}
    kv["select_options"] = SOME["wave"]
    want = expected(kv)
    folder = {"folder": str(tmp_path)} if tier == "disk" else {}
    found, _ = outputs(model, {**kv, "tier": tier, **folder})
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("store", STORES)
def test_clusters_that_stay_on_the_device(model, options, store):
    kv = {**ZONES, **options[store], "select": "wave"}
    kinds = [{**kv, "select_options": SOME["wave"] | {"cached": x}} for x in (0.0, 0.5)]
    ids, rows = prompt(length=70), []
    for each in kinds:
        llm.enable(model, kv=each)
        cache = KVCache(model, each)
        with torch.no_grad():
            model(ids[:, :60], past_key_values=cache)
            steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(60, 70)]
        rows.append(torch.cat(steps, 1))
        llm.disable(model)
    torch.testing.assert_close(*rows)
    assert cache.layers[0].selector.blocks.hits > 0


def test_a_graph_is_built_again(model, tmp_path):
    kv = {**ZONES, "select": "retrieval", "select_options": {"index": "graph", "topk": 16}}
    llm.enable(model, kv=kv)
    cache, ids = KVCache(model, kv), prompt(length=400)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        llm.save_cache(model, cache, tmp_path / "cache.safetensors")
        again = llm.load_cache(model, tmp_path / "cache.safetensors")
        assert again.layers[0].selector.built == cache.layers[0].selector.built > 0
        found, want = (model(ids[:, :3], past_key_values=x).logits for x in (again, cache))
    torch.testing.assert_close(found, want)
    llm.disable(model)


@pytest.mark.parametrize("prefill", ["triangle", "hybrid"])
def test_sparse_prefill_and_a_cache(model, options, prefill):
    """The prompt is read with the pattern, what follows from the cache."""
    ids = prompt(length=120)
    sparse = {"pattern": prefill, "block": 16, "tail": 16, "crossover": 0, "dense_layers": 0}
    kv = {**ZONES, **options["int"]}
    llm.enable(model, prefill=sparse, kv=kv)
    found = model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    seen = llm.summary(model)
    assert seen.sparse_calls == 3
    assert [x.cached_calls for x in seen.layers] == [4, 4, 4]
    assert isinstance(found.past_key_values, KVCache)
    llm.disable(model)
