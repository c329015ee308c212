"""Vision-language models: the text layers are sparse, the vision tower is left alone."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from dit_accel import llm
from dit_accel.llm.attention import NAME, POLICY

from .test_attention import CLOSE, FULL, SMALL, SPARSE
from .vision import PARTS, inputs, make, make_gemma3

every_model = pytest.mark.parametrize("name", PARTS)
PROMPTS = {
    "image": [40, ("image", 1, 8, 10), 60],
    "video": [30, ("video", 6, 4, 6), 70],
    "both": [20, ("image", 1, 4, 4), 10, ("video", 5, 4, 4), 30, ("video", 3, 4, 6), 40],
}
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@every_model
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_a_full_budget_gives_the_same_logits_and_tokens(name, prompt):
    model, given = make(name), inputs(name, prompt)
    plain = model(**given).logits
    tokens = model.generate(**given, **GREEDY)
    llm.enable(model, prefill={**FULL["blocks, all mass"], **SMALL})
    torch.testing.assert_close(model(**given).logits, plain, **CLOSE)
    torch.testing.assert_close(model(**given, use_cache=False).logits, plain, **CLOSE)
    assert torch.equal(model.generate(**given, **GREEDY), tokens)
    for x in llm.summary(model).layers:
        assert x.sparse_calls == 3
        assert x.dense_calls == {"decode": 5}


@every_model
def test_a_small_budget_changes_the_logits_and_is_counted(name):
    model, given = make(name), inputs(name, PROMPTS["both"])
    plain = model(**given).logits
    llm.enable(model, prefill=SPARSE)
    assert not torch.allclose(model(**given).logits, plain, **CLOSE)
    for x in llm.summary(model).layers:
        assert (x.sparse_calls, x.dense_calls) == (1, {})
        assert x.density < 0.9


@every_model
@pytest.mark.parametrize(
    ("side", "prefill"),
    [("left", {**FULL["triangle"], **SMALL}), ("left", SPARSE), ("right", SPARSE)],
    ids=["left, full", "left", "right"],
)
def test_a_padded_row_gives_what_it_gives_alone(name, side, prefill):
    model, rows = make(name), list(PROMPTS.values())
    llm.enable(model, prefill=prefill)
    given = inputs(name, *rows, side=side)
    logits = model(**given).logits
    for i, row in enumerate(rows):
        alone = model(**inputs(name, row)).logits
        real = given["attention_mask"][i].bool()
        torch.testing.assert_close(logits[i : i + 1, real], alone, **CLOSE)
    assert all(not x.dense_calls for x in llm.summary(model).layers)


@every_model
def test_padded_generation_gives_the_same_tokens(name):
    model, given = make(name), inputs(name, *PROMPTS.values())
    plain = model.generate(**given, **GREEDY)
    llm.enable(model, prefill={**FULL["triangle"], **SMALL})
    assert torch.equal(model.generate(**given, **GREEDY), plain)


@every_model
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 40}]
)
def test_generate_gives_the_same_tokens(name, options):
    model, given = make(name), inputs(name, PROMPTS["both"])
    plain = model.generate(**given, **GREEDY, **options)
    llm.enable(model, prefill={**FULL["blocks, all mass"], **SMALL})
    assert torch.equal(model.generate(**given, **GREEDY, **options), plain)
    assert set(llm.summary(model).layers[0].dense_calls) == {"decode"}


@every_model
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_later_turn_gives_what_transformers_gives(name, kind):
    model, given = make(name), inputs(name, PROMPTS["video"])
    later = inputs(name, [30])["input_ids"]

    def turns():
        config = model.config.get_text_config()
        cache = DynamicCache(config=config)
        if kind == "static":
            cache = StaticCache(config=config, max_cache_len=250)
        first = model(**given, past_key_values=cache).logits
        return torch.cat([first, model(later, past_key_values=cache).logits], 1)

    plain = turns()
    llm.enable(model, prefill={**FULL["blocks, all mass"], **SMALL})
    torch.testing.assert_close(turns(), plain, **CLOSE)
    assert [x.sparse_calls for x in llm.summary(model).layers] == [2, 2, 2]


@every_model
def test_the_vision_tower_keeps_its_attention(name, tmp_path):
    model, given = make(name), inputs(name, PROMPTS["both"])
    before = [set(vars(m)) for m in model.modules()]
    plain = model(**given).logits
    llm.enable(model, prefill=SPARSE)
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert model.config.text_config._attn_implementation == NAME
    assert not any(hasattr(m, POLICY) for m in model.model.visual.modules())
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    llm.disable(model)
    assert [set(vars(m)) for m in model.modules()] == before
    assert model.config.text_config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(**given).logits, plain, rtol=0, atol=0)


def test_images_of_gemma_3_that_see_themselves_are_dense_and_counted():
    model = make_gemma3()
    given = inputs("Gemma3", [60, ("image", 1, 4, 4), 60])
    given = {
        "input_ids": given["input_ids"],
        "token_type_ids": given["mm_token_type_ids"],
        "pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
    }
    text = inputs("Gemma3", [120])["input_ids"]
    plain, plain_text = model(**given).logits, model(text).logits
    tokens = model.generate(**given, **GREEDY)
    llm.enable(model, prefill={**FULL["triangle"], **SMALL})
    torch.testing.assert_close(model(**given).logits, plain, **CLOSE)
    assert torch.equal(model.generate(**given, **GREEDY), tokens)
    layers = llm.summary(model).layers
    assert [x.sparse_calls for x in layers] == [0, 0, 0]
    assert layers[1].dense_calls == {"a mask of pairs": 2, "decode": 5}
    torch.testing.assert_close(model(text).logits, plain_text, **CLOSE)
    # The first layer has a window, which is exact.
    assert [x.sparse_calls for x in llm.summary(model).layers] == [1, 1, 1]
    assert model.config.vision_config._attn_implementation == "sdpa"


@every_model
@pytest.mark.parametrize("prefill", [None, "grid"])
def test_a_cache_of_ones_choice(name, prefill):
    model, given = make(name), inputs(name, *PROMPTS.values())
    tokens = model.generate(**given, **GREEDY)
    kv = {"sink": 4, "recent": 8, "flush": 4, "select": "wave", "select_options": {"retrieve": 1.0}}
    sparse = prefill and {**SMALL, "pattern": prefill, "options": {"window": 4096}}
    llm.enable(model, prefill=sparse, kv=kv)
    found = model.generate(**given, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(found.sequences, tokens)
    assert isinstance(found.past_key_values, llm.KVCache)
    assert all(x.cached_calls == 5 for x in llm.summary(model).layers)
