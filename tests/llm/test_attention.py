"""Prefill through transformers: full budgets give what transformers gives, in every way a model is called."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from dit_accel import llm
from dit_accel.llm.attention import NAME

from .models import MODELS, SPARSE_LAYERS, make, prompt

every_model = pytest.mark.parametrize("name", MODELS)
FULL = {
    "blocks, all of them": {"pattern": "blocks", "options": {"topk": 1.0, "top_p": None}},
    "blocks, all mass": {"pattern": "blocks", "options": {"top_p": 1.0}},
    "a_shape": {"pattern": "a_shape", "options": {"window": 512}},
    "triangle": {"pattern": "triangle", "options": {"window": 512}},
}
SMALL = {"block": 16, "tail": 16, "crossover": 0, "dense_layers": 0}
SPARSE = {"pattern": "blocks", "options": {"topk": 0.2, "top_p": None}, **SMALL}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def density_of(name, layer, length=150):
    """Return the share of the causal pairs that a layer shows to its queries."""
    config = make(name).config
    sliding = (
        getattr(config, "layer_types", ["sliding_attention"] * 3)[layer] == "sliding_attention"
    )
    window = getattr(config, "sliding_window", None)
    if window is None or not sliding:
        return 1
    return sum(min(i, window) for i in range(1, length + 1)) / (length * (length + 1) / 2)


@every_model
def test_a_full_budget_gives_the_same_logits_and_tokens(name):
    model, ids = make(name), prompt()
    plain = model(ids).logits
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
    densities = [density_of(name, layer) for layer in range(3)]
    for prefill in FULL.values():
        llm.enable(model, prefill={**prefill, **SMALL})
        torch.testing.assert_close(model(ids).logits, plain, **CLOSE)
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), tokens)
        layers = llm.summary(model).layers
        assert sum(x.sparse_calls > 0 for x in layers) == SPARSE_LAYERS.get(name, 3)
        for x in layers:
            assert x.dense_calls["decode"] == 5
            assert x.density is None or x.density == pytest.approx(densities[x.layer])


@every_model
def test_a_small_budget_changes_the_logits_and_is_counted(name):
    model, ids = make(name), prompt()
    plain = model(ids).logits
    llm.enable(model, prefill=SPARSE)
    changed = not torch.allclose(model(ids).logits, plain, **CLOSE)
    layers = llm.summary(model).layers
    # Windows are exact.
    full = any(density_of(name, layer) == 1 for layer in range(3))
    assert changed == (SPARSE_LAYERS.get(name, 3) > 0 and full)
    for x in layers:
        assert (x.sparse_calls == 1 and 0 < x.density < 0.9) or x.dense_calls == {"soft cap": 1}


@every_model
@pytest.mark.parametrize(
    ("side", "prefill"),
    [("left", {**FULL["triangle"], **SMALL}), ("left", SPARSE), ("right", SPARSE)],
    ids=["left, full", "left", "right"],
)
def test_a_padded_row_gives_what_it_gives_alone(name, side, prefill):
    model, ids = make(name), prompt()
    mask = torch.ones_like(ids)
    real = slice(37, None) if side == "left" else slice(0, -37)
    mask[1] = 0
    mask[1, real] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    llm.enable(model, prefill=prefill)
    both = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(both[:1], model(ids[:1]).logits, **CLOSE)
    torch.testing.assert_close(both[1:, real], model(ids[1:, real]).logits, **CLOSE)


@every_model
def test_padded_generation_gives_the_same_tokens(name):
    model, ids = make(name), prompt()
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    llm.enable(model, prefill={**FULL["triangle"], **SMALL})
    ours = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours, plain)


@every_model
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_chunks_and_later_turns_give_what_one_call_gives(name, kind):
    model, ids = make(name), prompt()
    plain = model(ids).logits
    llm.enable(model, prefill={**FULL["a_shape"], **SMALL})
    if kind == "dynamic":
        cache = DynamicCache(config=model.config)
    else:
        cache = StaticCache(config=model.config, max_cache_len=200)
    chunks = [
        model(ids[:, a:b], past_key_values=cache).logits
        for a, b in ((0, 64), (64, 103), (103, 149), (149, 150))
    ]
    torch.testing.assert_close(torch.cat(chunks, 1), plain, **CLOSE)


def test_four_chunks_of_a_static_pattern_equal_one_shot():
    model, ids = make("Llama"), prompt()
    llm.enable(model, prefill={"pattern": "a_shape", "options": {"sink": 8, "window": 40}, **SMALL})
    whole = model(ids).logits
    cache = DynamicCache(config=model.config)
    chunks = [
        model(ids[:, a:b], past_key_values=cache).logits
        for a, b in ((0, 31), (31, 64), (64, 110), (110, 150))
    ]
    torch.testing.assert_close(torch.cat(chunks, 1), whole, **CLOSE)
    assert llm.summary(model).layers[0].density < 0.8


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 40}]
)
def test_generate_gives_the_same_tokens(options):
    model, ids = make("Llama"), prompt()
    ask = {"max_new_tokens": 6, "do_sample": False, **options}
    plain = model.generate(ids, **ask)
    llm.enable(model, prefill={**FULL["blocks, all mass"], **SMALL})
    assert torch.equal(model.generate(ids, **ask), plain)


def test_packed_sequences_do_not_see_each_other():
    model, ids = make("Llama"), prompt(1)
    positions = torch.cat([torch.arange(70), torch.arange(80)])[None]
    ask = {"position_ids": positions, "use_cache": False}
    plain = model(ids, **ask).logits
    llm.enable(model, prefill=SPARSE)
    torch.testing.assert_close(model(ids, **ask).logits, plain, **CLOSE)
    assert llm.summary(model).layers[0].dense_calls == {"a mask of pairs": 1}


def test_a_mask_of_pairs_is_honoured():
    model, ids = make("Llama"), prompt(1)
    mask = torch.ones(1, 1, 150, 150, dtype=torch.bool).tril()
    mask[..., 20:40] = False
    mask |= torch.eye(150, dtype=torch.bool)
    plain = model(ids, attention_mask=mask).logits
    llm.enable(model, prefill=SPARSE)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, plain, **CLOSE)


def test_holes_in_the_padding_are_dense_and_counted():
    model, ids = make("Llama"), prompt()
    mask = torch.ones_like(ids)
    mask[1, 50:60] = 0
    plain = model(ids, attention_mask=mask).logits
    llm.enable(model, prefill=SPARSE)
    ours = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(ours[mask.bool()], plain[mask.bool()], **CLOSE)
    assert llm.summary(model).layers[1].dense_calls == {"padding in the middle of a row": 1}


def test_short_prompts_and_dense_layers_are_dense_and_counted():
    model, ids = make("Llama"), prompt()
    llm.enable(model, prefill={**SPARSE, "crossover": 100, "dense_layers": [-1]})
    model(ids)
    model(ids[:, :99])
    layers = llm.summary(model).layers
    assert [x.sparse_calls for x in layers] == [1, 1, 0]
    assert layers[0].dense_calls == {"short prompt": 1}
    assert layers[2].dense_calls == {"dense layer": 2}


def test_layers_may_have_patterns_of_their_own():
    """TriangleMix does so: every key in the first layers, a triangle in the last ones."""
    model, ids = make("Llama"), prompt()
    triangle = {"pattern": "triangle", "options": {"window": 16}}
    llm.enable(model, prefill={**SMALL, "pattern": "dense", "by_layer": {0.34: triangle}})
    model(ids)
    assert [x.sparse_calls for x in llm.summary(model).layers] == [0, 0, 1]
    changes = {0.34: "a_shape", 1: triangle, -1: "dense"}
    llm.enable(model, prefill={**SMALL, "pattern": "triangle", "by_layer": changes})
    model(ids)
    layers = llm.summary(model).layers
    assert [x.sparse_calls for x in layers] == [1, 1, 0]
    assert layers[1].density < layers[0].density


def test_models_of_one_process_do_not_interfere(tmp_path):
    model, ids = make("Llama"), prompt()
    plain = model(ids).logits
    shares_config = type(model)(model.config).eval()
    shares_config.load_state_dict(model.state_dict())
    llm.enable(model, prefill=SPARSE)
    sparse = model(ids).logits
    torch.testing.assert_close(shares_config(ids).logits, plain, **CLOSE)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(ids).logits, sparse, rtol=0, atol=0)
    assert llm.summary(model).layers[1].sparse_calls == 1
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    again = type(model).from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"


def test_disable_restores_everything():
    model, ids = make("Llama"), prompt()
    plain = model(ids).logits
    before = [set(vars(m)) for m in model.modules()]
    llm.disable(model)
    llm.enable(model, prefill=SPARSE)
    llm.enable(model, prefill={**SPARSE, "pattern": "a_shape", "options": {}})
    llm.disable(model)
    assert [set(vars(m)) for m in model.modules()] == before
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=0)
    with pytest.raises(ValueError, match="model: not enabled"):
        llm.summary(model)


def test_weights_are_refused():
    model, ids = make("Llama"), prompt()
    llm.enable(model, prefill=SPARSE)
    with pytest.raises(ValueError, match="output_attentions=True"):
        model(ids, output_attentions=True)


@pytest.mark.parametrize(
    ("prefill", "message"),
    [
        ({"pattern": "triangel"}, "pattern='triangel'.*'triangle'"),
        ({"pattern": "blocks", "options": {"top": 0.5}}, "blocks.*'top'"),
        ({"pattern": "blocks", "options": {"top_p": 0}}, "top_p=0"),
        ({"pattern": "blocks", "options": {"top_p": None}}, "top_p=None, topk=None"),
        ({"pattern": "a_shape", "options": {"window": 0}}, "window=0"),
        ({"pattern": "triangle", "options": {"sink": -1}}, "sink=-1"),
        ({"dense_layers": [5], "pattern": "a_shape"}, "dense_layers: layer 5"),
        ({"by_layer": {7: "a_shape"}, "pattern": "triangle"}, "by_layer: layer 7"),
        ({"by_layer": {1.5: "a_shape"}, "pattern": "triangle"}, "by_layer=1.5"),
        ({"by_layer": {0: {"name": "a_shape"}}, "pattern": "triangle"}, "by_layer=.*'name'"),
        ({"by_layer": {0: "rings"}, "pattern": "triangle"}, "pattern='rings'"),
        ({"block": 48}, "block=48"),
        ({"tail": -1}, "tail=-1"),
        ({"crossover": -1}, "crossover=-1"),
        ("slow", "prefill='slow'"),
        (None, "prefill=None"),
    ],
)
def test_bad_settings_are_refused_and_leave_the_model_as_it_was(prefill, message):
    model = make("Llama")
    with pytest.raises(ValueError, match=message):
        llm.enable(model, prefill=prefill)
    assert model.config._attn_implementation == "sdpa"


def test_what_is_no_language_model_is_refused():
    with pytest.raises(ValueError, match="model: Linear"):
        llm.enable(torch.nn.Linear(2, 2), prefill=SPARSE)
