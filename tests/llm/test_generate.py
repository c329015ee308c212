"""Generation: the tokens that transformers gives, times, and counts."""

import pytest
import torch

from dit_accel.llm.attention import POLICY
from dit_accel.llm.generate import encode, generate
from dit_accel.llm.loading import read_source
from dit_accel.llm.report import dense_reasons, prompt_density, summary_line

from .models import make
from .small import tokenizer

TEXT = "A text of one hundred letters or so, which is enough for several blocks of keys. " * 3
SMALL = {"block": 16, "tail": 16, "crossover": 0}
FULL = {"pattern": "blocks", "options": {"top_p": 1.0}, **SMALL}
SPARSE = {"pattern": "blocks", "options": {"topk": 0.2, "top_p": None}, **SMALL}


@pytest.fixture(scope="module")
def model():
    return make("Llama", vocab_size=259, eos_token_id=None)


@pytest.fixture(scope="module")
def words():
    return tokenizer()


@pytest.mark.parametrize("prefill", ["none", None, FULL], ids=["none", "None", "full budget"])
def test_it_generates_what_transformers_does(model, words, prefill):
    ids = words(TEXT, return_tensors="pt").input_ids
    plain = model.generate(ids, max_new_tokens=5, do_sample=False)
    done = generate(model, words, TEXT, prefill=prefill, max_new_tokens=5)
    assert done.text == words.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)
    assert (done.prompt_tokens, done.new_tokens) == (ids.shape[1], 5)
    assert done.first_token_seconds > 0
    assert done.tokens_per_second > 0


def test_sparse_calls_are_counted_and_the_model_is_dense_afterwards(model, words):
    done = generate(model, words, TEXT, prefill=SPARSE, max_new_tokens=3)
    assert done.prefill.sparse_calls == 2
    assert dense_reasons(done.prefill) == {"dense layer": 1}
    layers = [x.density for x in done.prefill.layers if x.density is not None]
    assert prompt_density(done.prefill) == pytest.approx((1 + sum(layers)) / 3)
    assert summary_line(done.prefill).startswith("prefill: blocks, density 0.")
    assert not any(hasattr(x, POLICY) for x in model.modules())
    assert done.to_dict()["density"] == prompt_density(done.prefill)


def test_short_prompts_are_dense_and_say_so(model, words):
    done = generate(model, words, "abc", prefill={**SPARSE, "crossover": 64}, max_new_tokens=1)
    assert prompt_density(done.prefill) == 1
    assert dense_reasons(done.prefill) == {"dense layer": 1, "short prompt": 2}
    assert done.tokens_per_second is None


def test_the_model_is_dense_after_a_failure(model, words, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="no"):
        generate(model, words, TEXT, prefill=SPARSE)
    assert not any(hasattr(x, POLICY) for x in model.modules())


def test_generation_is_greedy_whatever_the_model_prefers(words):
    model = make("Llama", vocab_size=259, eos_token_id=None)
    usual = generate(model, words, TEXT, prefill=None, max_new_tokens=6).text
    model.generation_config.do_sample = True
    model.generation_config.temperature = 9.0
    assert generate(model, words, TEXT, prefill=None, max_new_tokens=6).text == usual


def test_a_chat_prompt_is_a_message_of_the_user(words):
    assert words.decode(encode(words, "hi", chat=True)[0]) == "<user>hi<assistant>"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"prompt": ""}, "prompt=''"),
        ({"prompt": torch.zeros(1, 0, dtype=torch.long)}, "prompt=tensor"),
        ({"prefill": "fest"}, "prefill='fest'.*'fast'"),
    ],
    ids=["none", "bool", "text", "tokens", "preset"],
)
def test_bad_arguments_are_named(model, words, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(model, words, **{"prompt": TEXT, "prefill": SPARSE, **arguments})


def test_a_tokenizer_without_a_chat_template_is_refused(model):
    with pytest.raises(ValueError, match="chat=True"):
        generate(model, tokenizer(chat=False), TEXT, chat=True)


def test_the_real_model_answers_with_sparse_prefill(smollm2):
    model, words = smollm2
    filler = "Paris is the capital of France. Bern lies on a river. " * 20
    prompt = f"{filler}\nWhat is the capital of France?"
    options = {"topk": 0.3, "top_p": None}
    settings = {"pattern": "blocks", "options": options, "block": 32, "tail": 32, "crossover": 0}
    done = generate(model, words, prompt, prefill=settings, max_new_tokens=16, chat=True)
    assert "Paris" in done.text
    assert prompt_density(done.prefill) < 0.8


def test_a_cache_of_ones_choice(small_llama):
    source = read_source(str(small_llama))
    model = source.load(dtype=torch.float32, device="cpu")
    text = "a text of some length " * 8
    own = generate(model, source.tokenizer, text, prefill=None, max_new_tokens=12)
    assert own.read_share is None
    same = generate(
        model, source.tokenizer, text, prefill=None, kv={"sink": 4, "recent": 8}, max_new_tokens=12
    )
    assert same.text == own.text
    assert same.cache_bytes == own.cache_bytes
    assert same.read_share == 1
    small = generate(model, source.tokenizer, text, kv="quest", max_new_tokens=12, prefill="none")
    assert small.to_dict()["read_share"] == 1
    window = {"select": "none", "sink": 4, "recent": 8}
    less = generate(model, source.tokenizer, text, prefill=None, kv=window, max_new_tokens=12)
    assert less.cache_bytes < own.cache_bytes / 2
    assert less.read_share < 0.5
    assert model.config._attn_implementation == "sdpa"
