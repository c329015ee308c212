"""Codes on the model with handwritten weights: a context of keys and values, questions in three modes."""

import random

import pytest
import torch

from dit_accel import llm
from dit_accel.llm.bench.kv.conversation import MODES, converse
from dit_accel.llm.bench.kv.lookups import key_value
from dit_accel.llm.bench.wired import wired_model
from dit_accel.llm.kvcache.cache import KVCache
from dit_accel.llm.kvcache.calibrate import CalibrationSettings, calibrate
from dit_accel.llm.kvcache.codebooks import write_codebooks


@pytest.mark.parametrize(("bits", "scope"), [(4, "layer"), (2, "head")])
def test_codes_find_every_value(bits, scope, tmp_path):
    model = wired_model()
    samples = [torch.tensor([key_value(1024, 1, random.Random(i)).context]) for i in (1, 2)]
    settings = CalibrationSettings(bits=bits, scope=scope, rounds=2)
    books = calibrate(model, samples[:1], samples[1:], settings)
    write_codebooks(tmp_path / "pq.safetensors", books)
    kv = {"store": "pq", "store_options": {"codebooks": str(tmp_path / "pq.safetensors")}}
    llm.enable(model, kv=kv)
    session = key_value(2500, 2, random.Random(0))
    for mode in MODES:
        found = converse(model, session, mode, new_cache=lambda: KVCache(model, kv), new_tokens=1)
        assert [x.right for x in found] == [True] * 2
        assert found[-1].cache_bytes < 0.25 * 2 * 2 * 2 * 64 * 4 * found[-1].tokens
