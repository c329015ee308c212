"""Every selector that chooses tokens runs in half precision, with padded prompts, turns and beams."""

import pytest
import torch

from dit_accel import llm
from dit_accel.llm.kvcache.cache import KVCache
from dit_accel.llm.kvcache.selector import PACKAGE, Selector
from dit_accel.llm.plugins import classes_in

from ..models import make, prompt

SMALL = {"sink": 4, "recent": 8, "flush": 16}
CHOICES = {
    "snapkv": [{"budget": 0.2}],
    "quest": [{"budget": 0.2}],
    "wave": [{"retrieve": 0.2}, {"retrieve": 0.2, "cached": 0.3}],
    "retrieval": [{"topk": 9}, {"topk": 9, "index": "graph"}],
}
CASES = [
    pytest.param({**SMALL, "select": name, "select_options": options}, id=f"{name}-{i}")
    for name, each in CHOICES.items()
    for i, options in enumerate(each)
]


def test_every_selector_is_here():
    assert {*CHOICES, "all", "none"} == set(classes_in(PACKAGE, Selector))


@pytest.mark.parametrize("preset", ["snapkv", "quest", "retroinfer", "retrieval"])
def test_presets(preset):
    model = llm.enable(make("Llama"), kv=preset)
    found = model.generate(
        prompt(length=1400), max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    assert 0.2 < found.past_key_values.read_share < 1.0


def read(kv, dtype):
    """Return the logits of turns after a padded prompt, and the share of the tokens that was read."""
    model, ids = llm.enable(make("Llama").to(dtype), kv=kv), prompt(length=348)
    mask = torch.ones_like(ids)
    mask[1, :50] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    cache, found = KVCache(model, kv), []
    for rows in torch.arange(348).split([340, 1, 1, 6]):
        with torch.no_grad():
            out = model(
                ids[:, rows],
                attention_mask=mask[:, : rows[-1] + 1],
                position_ids=position[:, rows],
                past_key_values=cache,
            )
        found.append(out.logits)
    return torch.cat(found[1:], 1), cache.read_share


@pytest.mark.parametrize("kv", CASES)
def test_dtypes_turns_and_padding(kv):
    """Half precision gives what fp32 gives, but for choices between tokens that score alike."""
    want, _ = read(kv, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        found, share = read(kv, dtype)
        assert found.dtype == dtype
        error = (found.float() - want).norm() / want.norm()
        assert error < 0.15
        assert share < 0.6


@pytest.mark.parametrize("kv", CASES)
def test_beams(kv):
    model = llm.enable(make("Llama"), kv=kv)
    found = model.generate(prompt(length=330), max_new_tokens=4, num_beams=3, do_sample=False)
    assert found.shape == (2, 334)
