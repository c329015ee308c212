"""Caches that read every token exactly give what transformers' own cache gives, whatever is done to them."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from dit_accel import llm
from dit_accel.llm.kvcache.cache import KVCache

from ..models import make, prompt

ZONES = {"sink": 4, "recent": 8, "flush": 4}
EXACT = {
    "dense": {**ZONES},
    "everything stored": {"sink": 0, "recent": 1, "flush": 1},
    "nothing stored": {"recent": 10_000},
    "snapkv": {**ZONES, "select": "snapkv", "select_options": {"budget": 1.0}},
    "quest": {**ZONES, "select": "quest", "select_options": {"budget": 1.0}},
    "wave": {**ZONES, "select": "wave", "select_options": {"retrieve": 1.0}},
    "retrieval": {**ZONES, "select": "retrieval", "select_options": {"topk": 1.0}},
}
"""Settings that change nothing. A store or selector that can read everything exactly adds a line."""
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(params=["everything stored", "wave", "retrieval"])
def kv(request):
    """Three kinds; the others are in the tests that draw operations, and in test_compose.py."""
    return EXACT[request.param]


@pytest.fixture
def model():
    return make("Llama")


def step(model, ids, cache, **more):
    with torch.no_grad():
        return model(ids, past_key_values=cache, **more).logits


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("Llama", name) for name in EXACT),
        *((family, "wave") for family in ("Qwen2", "Qwen3", "Gemma3", "Glm4", "SmolLM3")),
    ],
)
def test_generate_gives_the_tokens_of_dense_attention(family, name):
    model, ids, kv = make(family), prompt(length=80), EXACT[name]
    want = model.generate(ids, max_new_tokens=10, do_sample=False)
    llm.enable(model, kv=kv)
    found = model.generate(ids, max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(found.sequences, want)
    assert isinstance(found.past_key_values, KVCache)
    assert found.past_key_values.read_share == pytest.approx(1.0)


@pytest.mark.parametrize("sizes", [(1, 1, 30), (40, 1, 1, 17, 3), (3, 2, 5, 1)])
def test_turns_of_any_length(model, kv, sizes):
    ids = prompt(length=sum(sizes))
    want = model(ids).logits
    llm.enable(model, kv=kv)
    cache = KVCache(model, kv)
    found = torch.cat([step(model, x, cache) for x in ids.split(sizes, 1)], 1)
    torch.testing.assert_close(found, want, **CLOSE)
    assert cache.get_seq_length() == sum(sizes)


@pytest.mark.parametrize("first", [0, 3, 30, 45])
def test_padding_on_the_left(model, kv, first):
    """Rows of a batch give what they give alone, over a prompt, single tokens and a second turn."""
    ids = prompt(length=60)
    mask = torch.ones_like(ids)
    mask[1, :first] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    alone = model(ids[1:, first:]).logits
    llm.enable(model, kv=kv)
    cache, found = KVCache(model, kv), []
    for rows in torch.arange(60).split([50, 1, 1, 8]):
        found.append(
            step(
                model,
                ids[:, rows],
                cache,
                attention_mask=mask[:, : rows[-1] + 1],
                position_ids=position[:, rows],
            )
        )
    torch.testing.assert_close(torch.cat(found, 1)[1:, first:], alone, **CLOSE)


def test_prompts_of_different_lengths_in_generate(model, kv):
    ids = prompt(length=40)
    mask = torch.ones_like(ids)
    mask[0, :25] = 0
    ids[0, :25] = 0
    want = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    llm.enable(model, kv=kv)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    assert torch.equal(found, want)


def test_beams(model, kv):
    ids = prompt(length=40)
    want = model.generate(ids, max_new_tokens=10, num_beams=3, do_sample=False)
    llm.enable(model, kv=kv)
    assert torch.equal(model.generate(ids, max_new_tokens=10, num_beams=3, do_sample=False), want)


def test_chunks_of_a_prompt(model, kv):
    ids = prompt(length=90)
    want = model.generate(ids, max_new_tokens=5, do_sample=False)
    llm.enable(model, kv=kv)
    found = model.generate(ids, max_new_tokens=5, do_sample=False, prefill_chunk_size=20)
    assert torch.equal(found, want)


def test_lookup_decoding_crops_the_cache(model, kv):
    ids = prompt(rows=1, length=40).repeat(1, 2)
    want = model.generate(ids, max_new_tokens=30, do_sample=False)
    llm.enable(model, kv=kv)
    found = model.generate(ids, max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(found, want)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(1, 20)),
        st.tuples(st.just("crop"), st.integers(1, 25)),
        st.tuples(st.just("rows"), st.permutations([0, 1])),
        st.tuples(st.just("fork"), st.integers(1, 5)),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=10, deadline=None)
@given(operations=OPERATIONS, name=st.sampled_from(sorted(EXACT)), first=st.integers(0, 12))
def test_crops_rows_and_forks_in_any_order(operations, name, first):
    check_operations(operations, EXACT[name], first)


def check_operations(operations, kv, first=0):
    """Compare a cache with transformers' own after each operation; `first` tokens of row 1 are padding."""
    model, own = make("Llama", num_hidden_layers=2), DynamicCache()
    dense = copy.deepcopy(model)
    llm.enable(model, kv=kv)
    cache, tokens = KVCache(model, kv), prompt(length=200)
    mask = torch.ones(2, 0, dtype=torch.long)
    at = 0

    def read(count, cache, own, mask):
        ids = tokens[:, at : at + count]
        new = torch.ones(2, count, dtype=torch.long)
        if not mask.shape[1]:
            new[1, : min(first, count - 1)] = 0
        mask = torch.cat([mask, new], 1)
        more = {
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -count:],
        }
        found, want = step(model, ids, cache, **more), step(dense, ids, own, **more)
        real = mask[:, -count:].bool()
        torch.testing.assert_close(found[real], want[real], **CLOSE)
        return mask

    mask = read(30, cache, own, mask)
    at += 30
    for what, how in operations:
        if what == "read":
            mask = read(how, cache, own, mask)
            at += how
        elif what == "crop":
            count = min(how, mask.shape[1] - 1 - first)
            if count > 0:
                cache.crop(-count)
                own.crop(-count)
                mask = mask[:, :-count]
        elif what == "rows":
            index = torch.tensor(how)
            cache.reorder_cache(index)
            own.reorder_cache(index)
            mask = mask[index]
        else:
            other, copied = cache.fork(), copy.deepcopy(own)
            read(how, other, copied, mask)
            other.crop(-1)
        assert cache.get_seq_length() == own.get_seq_length()
    read(3, cache, own, mask)


def test_requests_on_forks_through_generate(model, kv):
    """A document with two questions: each fork gives the output of a separate call."""
    ids = prompt(rows=1, length=60)
    asked = [torch.cat([ids, prompt(rows=1, length=n, seed=n)], 1) for n in (1, 6)]
    want = [model.generate(x, max_new_tokens=5, do_sample=False) for x in asked]
    llm.enable(model, kv=kv)
    cache = KVCache(model, kv)
    step(model, ids, cache)
    for one, tokens in zip(asked, want, strict=True):
        found = model.generate(one, past_key_values=cache.fork(), max_new_tokens=5, do_sample=False)
        assert torch.equal(found, tokens)
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
@pytest.mark.parametrize("first", [0, 20])
def test_a_cache_comes_back_from_a_file(kv, tmp_path, family, first):
    model, ids = make(family), prompt(length=90)
    llm.enable(model, kv=kv)
    cache, mask = KVCache(model, kv), torch.ones_like(ids)
    mask[1, :first] = 0
    step(model, ids[:, :80], cache, attention_mask=mask[:, :80])
    path = tmp_path / "made" / "cache.safetensors"
    llm.save_cache(model, cache, path)
    again = llm.load_cache(model, path)
    assert again.kv == cache.kv
    assert again.nbytes == cache.nbytes
    found = [step(model, ids[:, 80:], x, attention_mask=mask) for x in (cache, again)]
    assert torch.equal(*found)
    if family == "Gemma3":  # transformers' layers with windows do not crop
        return
    cache.crop(-30)
    again.crop(-30)
    found = [step(model, ids[:, 60:70], x, attention_mask=mask[:, :70]) for x in (cache, again)]
    assert torch.equal(*found)


def test_bytes_are_those_of_the_tokens(model):
    llm.enable(model, kv=ZONES)
    cache = KVCache(model, ZONES)
    step(model, prompt(length=100), cache)
    layers, rows, heads, head_dim = 3, 2, 2, 16
    assert cache.nbytes == layers * rows * heads * head_dim * 100 * 2 * 4


def test_two_models_do_not_interfere(model, kv):
    other, ids = make("Llama"), prompt()
    want = model.generate(ids, max_new_tokens=8, do_sample=False)
    llm.enable(model, kv=kv)
    plain = other.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert type(plain.past_key_values) is DynamicCache
    assert torch.equal(plain.sequences, want)
    llm.disable(model)
    again = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert type(again.past_key_values) is DynamicCache


def test_use_cache_false_needs_none(model, kv):
    ids = prompt()
    want = model(ids).logits
    llm.enable(model, kv=kv)
    found = model(ids, use_cache=False)
    assert found.past_key_values is None
    torch.testing.assert_close(found.logits, want, **CLOSE)
