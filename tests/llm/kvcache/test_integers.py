"""Tokens as integers: errors, bytes, and whatever is done to a cache of them."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel import llm
from dit_accel.config import KVConfig
from dit_accel.llm.kvcache.cache import KVCache
from dit_accel.llm.kvcache.packing import pack, unpack, values_per_word
from dit_accel.llm.kvcache.part import Part
from dit_accel.llm.kvcache.store import store_of

from ..models import make, prompt
from .store_cases import OPERATIONS, check_operations, decoded, tokens

ZONES = {"sink": 4, "recent": 8, "flush": 4}
SMALL = {**ZONES, "store": "int"}


def stored(part, **options):
    store = store_of("int", options)
    store.append(part)
    return store, decoded(store)


@given(bits=st.integers(1, 8), words=st.integers(0, 5), seed=st.integers(0, 9))
def test_packed_integers_come_back(bits, words, seed):
    generator = torch.Generator().manual_seed(seed)
    count = words * values_per_word(bits)
    x = torch.randint(2**bits, (2, 3, count), generator=generator, dtype=torch.uint8)
    packed = pack(x, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape[-1] * 8 == count * bits
    assert torch.equal(unpack(packed, bits), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_is_half_a_step(bits, dtype):
    part = tokens(96, head_dim=64, dtype=dtype)
    _, found = stored(part, bits=bits, group=32)
    assert found.k.dtype == found.v.dtype == dtype
    rounding = 2 * torch.finfo(dtype).eps + 2**-9
    for x, y, axis in ((part.k, found.k, 2), (part.v, found.v, 3)):
        groups = x.float().unflatten(axis, (-1, 32))
        step = (groups.amax(axis + 1) - groups.amin(axis + 1)) / (2**bits - 1)
        limit = step.repeat_interleave(32, axis) / 2 + rounding * x.float().abs().amax()
        assert ((x.float() - y.float()).abs() <= limit).all()


def test_more_bits_have_smaller_errors():
    part = tokens(96, head_dim=64)
    errors = [(stored(part, bits=bits)[1].k - part.k).square().mean() for bits in (2, 3, 4, 8)]
    assert all(y < x / 3 for x, y in itertools.pairwise(errors))


def test_constant_and_very_large_values():
    k = torch.full((1, 1, 32, 32), 7.0)
    _, found = stored(Part.of(k, k))
    assert torch.equal(found.k, k)
    _, found = stored(Part.of(k * 1e6, k * -1e6))
    assert found.k.isfinite().all()
    assert found.v.isfinite().all()


def test_padding_does_not_widen_the_scale():
    part = tokens(32, head_dim=32, padding=9)
    part.k[1, :, :9] = 1000.0
    _, found = stored(part)
    error = (found.k - part.k)[1, :, 9:].abs().amax()
    assert error < 1
    nothing = Part.of(part.k, part.v, torch.zeros(2, 1, 32, dtype=torch.bool))
    assert stored(nothing)[1].k.isfinite().all()


@pytest.mark.parametrize(("bits", "expected"), [(2, 96), (3, 128), (4, 160), (8, 288)])
def test_bytes_of_a_token(bits, expected):
    """`bits + 32 / group` bits a value; 512 bytes a token and head at fp16."""
    store, _ = stored(tokens(64, head_dim=128, dtype=torch.float16), bits=bits)
    assert store.nbytes == 2 * 2 * 64 * expected


@settings(max_examples=15, deadline=None)
@given(
    operations=OPERATIONS,
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([8, 16]),
    padding=st.sampled_from([0, 5, 20]),
    values=st.sampled_from([500, 2**19]),
)
def test_operations_in_any_order(operations, bits, group, padding, values):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dit_accel.llm.kvcache.store.CPU_VALUES", values)
        check_operations(store_of("int", {"bits": bits, "group": group}), operations, padding)


@pytest.mark.parametrize("kv", ["int4", "int3", "int2"])
def test_presets(kv):
    config = KVConfig.load(kv)
    assert (config.store, config.sink, config.recent) == ("int", 64, 128)
    model = make("Llama", head_dim=32)
    llm.enable(model, kv=kv)
    out = model.generate(
        prompt(length=260), max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    layer = out.past_key_values.layers[0]
    assert layer.stored == 64  # two groups of 68 tokens that are neither first nor last
    assert layer.store.bits == int(kv[-1])


@pytest.mark.parametrize("padding", [0, 30])
def test_eight_bits_are_close_to_dense(padding):
    """Prompt, turns and single tokens through a whole model, rows with and without padding."""
    model, ids = make("Llama"), prompt(length=150)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    want = model(ids, attention_mask=mask, position_ids=position).logits
    kv = {**SMALL, "store_options": {"bits": 8, "group": 16}}
    llm.enable(model, kv=kv)
    cache, found = KVCache(model, kv), []
    with torch.no_grad():
        for at in torch.arange(150).split([100, 1, 40, 1, 8]):
            found.append(
                model(
                    ids[:, at],
                    attention_mask=mask[:, : at[-1] + 1],
                    position_ids=position[:, at],
                    past_key_values=cache,
                ).logits
            )
    real = mask.bool()
    error = (torch.cat(found, 1) - want)[real].norm() / want[real].norm()
    assert 0 < error < 0.005
    assert cache.layers[0].stored == 128
    assert cache.nbytes < 0.5 * 3 * 2 * 2 * 16 * 150 * 2 * 4


def test_generate_with_beams_crops_and_turns():
    model, ids = make("Llama"), prompt(rows=1, length=80).repeat(1, 2)
    llm.enable(model, kv={**SMALL, "store_options": {"bits": 8, "group": 16}})
    model.generate(ids, max_new_tokens=20, num_beams=3, do_sample=False)
    model.generate(ids, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits=5"),
        ({"group": 24}, "group=24"),
        ({"group": 32}, "group=32.*head_dim=16.* 8, 16"),
        ({"mush": 1}, "int.*'mush'"),
    ],
)
def test_refusals(options, message):
    model = make("Llama")
    with pytest.raises(ValueError, match=message):
        llm.enable(model, kv={"store": "int", "store_options": options})
    assert model.config._attn_implementation == "sdpa"
