"""Calls and settings that a cache refuses by name, without a loss."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from dit_accel import llm
from dit_accel.config import KVConfig
from dit_accel.llm.kvcache.cache import KVCache

from ..models import make, prompt


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        ("mush", "kv='mush'"),
        ({"store": "mush"}, "store='mush'"),
        ({"store_options": {"bits": 3}}, "dense.*'bits'"),
        ({"select": "mush"}, "select='mush'"),
        ({"recent": 0}, "recent=0"),
        ({"sink": -1}, "sink=-1"),
        ({"flush": 0}, "flush=0"),
        ({"dense_layers": 4}, "dense_layers=4"),
        ({"dense_layers": 3}, "dense_layers=3"),
        ({"dense_layers": [7]}, "layer 7"),
        ({"mush": 1}, "'mush'"),
    ],
)
def test_settings(kv, message):
    model = make("Llama")
    with pytest.raises(ValueError, match=message):
        llm.enable(model, kv=kv)
    assert model.config._attn_implementation == "sdpa"


def test_none_is_no_cache():
    model = llm.enable(make("Llama"), kv="none")
    assert type(model(prompt(), use_cache=True).past_key_values) is DynamicCache
    with pytest.raises(ValueError, match="kv='none'"):
        KVCache(model, "none")


def test_a_model_that_was_not_enabled():
    """The first call fails, and the cache is as it was."""
    model, ids = make("Llama"), prompt()
    kv = {"sink": 4, "recent": 8}
    want = model(ids).logits[:, 100:]
    cache = KVCache(model, kv)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"past_key_values: .*enable"):
            model(ids[:, :100], past_key_values=cache)
    llm.enable(model, kv=kv)
    with torch.no_grad():
        model(ids[:, :100], past_key_values=cache)
        llm.disable(model)
        with pytest.raises(ValueError, match=r"past_key_values: .*enable"):
            model(ids[:, 100:], past_key_values=cache)
        llm.enable(model, kv=kv)
        found = model(ids[:, 100:], past_key_values=cache).logits
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_copies_and_configs_of_a_model():
    model, ids = make("Llama"), prompt()
    config = copy.deepcopy(model.config)
    llm.enable(model, kv="dense")
    want = model.generate(ids, max_new_tokens=5, do_sample=False)
    other = copy.deepcopy(model)
    llm.disable(model)
    assert torch.equal(other.generate(ids, max_new_tokens=5, do_sample=False), want)
    cache = KVCache(config, "dense")
    found = other.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, want)


@pytest.mark.parametrize(
    ("family", "message"), [("Gemma2", "softcapping"), ("Mistral", "dense_layers=0")]
)
def test_models(family, message):
    with pytest.raises(ValueError, match=f"kv: .*{message}"):
        llm.enable(make(family), kv="dense")


def test_caches_of_another_kind():
    model, ids = make("Llama"), prompt()
    full = DynamicCache(config=model.config)
    model(ids, past_key_values=full)
    llm.enable(model, kv="dense")
    with pytest.raises(ValueError, match=r"past_key_values: .*DynamicCache.*150"):
        model(ids[:, :1], past_key_values=full)
    assert full.get_seq_length() == 150
    with pytest.raises(ValueError, match=r"past_key_values: .*StaticCache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=200))
    with pytest.raises(ValueError, match=r"past_key_values: .*StaticCache"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    other = KVCache(make("Llama", num_hidden_layers=2))
    with pytest.raises(ValueError, match=r"past_key_values: .*2 layers.*3 layers"):
        model(ids, past_key_values=other)


def test_masks_of_pairs():
    model, ids = make("Llama"), prompt()
    llm.enable(model, kv="dense")
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(2, 1, 150, 150, dtype=torch.bool).tril())
    cache = KVCache(model)
    want = model(ids, past_key_values=cache).logits
    pairs = torch.ones(2, 1, 3, 153, dtype=torch.bool)
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids[:, :3], past_key_values=cache, attention_mask=pairs)
    # The cache is as it was.
    assert cache.get_seq_length() == 150
    found = model(torch.cat([ids, ids[:, :3]], 1)).logits
    torch.testing.assert_close(want, found[:, :150])
    torch.testing.assert_close(model(ids[:, :3], past_key_values=cache).logits, found[:, 150:])
    assert cache.get_seq_length() == 153


def test_settings_come_back_from_plain_values():
    config = KVConfig(sink=3, dense_layers=[0, -1])
    assert KVConfig.from_dict(config.to_dict()) == config


def test_files_of_another_model(tmp_path):
    model, path = make("Llama"), tmp_path / "cache.safetensors"
    llm.enable(model, kv="dense")
    llm.save_cache(model, KVCache(model), path)
    with pytest.raises(ValueError, match="layers=3"):
        llm.load_cache(make("Llama", num_hidden_layers=2), path)
    with pytest.raises(ValueError, match=r"path=.*missing\.safetensors"):
        llm.load_cache(model, tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match=r"cache: .*DynamicCache"):
        llm.save_cache(model, DynamicCache(), path)
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(torch.randn(x.shape))
    with pytest.raises(ValueError, match=r"path=.*weights"):
        llm.load_cache(model, path)
