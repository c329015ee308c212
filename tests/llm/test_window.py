"""Layers with a sliding window: exact at the cost of the window, and no mask of all pairs is made for them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from dit_accel import llm
from dit_accel.config import PrefillConfig
from dit_accel.kernels import block_sparse_attention
from dit_accel.llm import dense as dense_module
from dit_accel.llm.attention import is_window, padding_mask
from dit_accel.llm.dense import dense_attention
from dit_accel.llm.policy import Policy
from dit_accel.llm.window import window_attention, window_density, window_plan

from .models import make, prompt

lengths = st.tuples(st.integers(1, 60), st.integers(0, 40)).map(lambda x: (x[0], sum(x)))
windows = st.integers(1, 80)
CLOSE = {"rtol": 1e-8, "atol": 1e-9}


def shown(q_len, kv_len, window):
    """Return the pairs that a window shows, `[Lq, Lk]`."""
    at = torch.arange(q_len)[:, None] + kv_len - q_len
    key = torch.arange(kv_len)
    return (key <= at) & (at - key < window)


def inputs(q_len, kv_len, batch=2):
    generator = torch.Generator().manual_seed(0)
    sizes = (4, q_len), (2, kv_len), (2, kv_len)
    return (torch.randn(batch, *x, 8, generator=generator, dtype=torch.float64) for x in sizes)


@given(lengths=lengths, window=windows)
def test_plan_and_density_are_those_of_the_window(lengths, window):
    plan = window_plan(*lengths, window=window, block=16)
    mask = shown(*lengths, window)
    assert torch.equal(plan.to_dense_mask()[0, 0], mask)
    of_all = mask.sum() / shown(*lengths, 10**6).sum()
    assert window_density(*lengths, window) == pytest.approx(float(of_all))
    assert plan.density() == pytest.approx(float(of_all))


@given(lengths=lengths, window=windows, rows=st.integers(1, 40))
def test_chunks_of_dense_attention_are_exact(lengths, window, rows):
    q, k, v = inputs(*lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense_module, "WINDOW_ROWS", rows)
        out = window_attention(q, k, v, scale=0.5, window=window, block=16)
    mask = shown(*lengths, window)
    exact = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5, enable_gqa=True)
    torch.testing.assert_close(out, exact, **CLOSE)
    plan = window_plan(*lengths, window=window, block=16)
    torch.testing.assert_close(block_sparse_attention(q, k, v, plan, scale=0.5), exact, **CLOSE)


@given(lengths=lengths, window=windows, rows=st.integers(1, 40), capped=st.booleans())
def test_windows_with_padding_and_soft_caps_are_exact(lengths, window, rows, capped):
    q_len, kv_len = lengths
    q, k, v = inputs(*lengths)
    real = torch.rand(2, kv_len, generator=torch.Generator().manual_seed(kv_len)) < 0.7
    visible = shown(*lengths, window) & real[:, None, None]
    scores = q @ k.repeat_interleave(2, 1).mT * 0.5
    if capped:
        scores = 3 * torch.tanh(scores / 3)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense_module, "WINDOW_ROWS", rows)
        out = dense_attention(
            q,
            k,
            v,
            scale=0.5,
            window=window,
            mask=real[:, None, None],
            softcap=3.0 if capped else None,
        )
    sees = visible.any(-1).expand(2, 4, q_len)
    exact = weights @ v.repeat_interleave(2, 1)
    close = {"rtol": 1e-5, "atol": 1e-5} if capped else CLOSE  # soft caps are made in fp32
    torch.testing.assert_close(out[sees], exact[sees], **close)
    assert out.isfinite().all()


def test_a_chunk_reads_only_the_keys_of_its_window(monkeypatch):
    read = []

    def count(q, k, v, **options):
        read.append(k.shape[2])
        return scaled_dot_product_attention(q, k, v, **options)

    monkeypatch.setattr(dense_module, "scaled_dot_product_attention", count)
    monkeypatch.setattr(dense_module, "WINDOW_ROWS", 16)
    q, k, v = inputs(100, 140)
    dense_attention(q, k, v, scale=1.0, window=20)
    assert read == [35] * 6 + [23]


@given(
    window=st.integers(1, 12),
    queries=st.integers(1, 15),
    past=st.integers(0, 30),
    padding=st.lists(st.integers(0, 8), min_size=1, max_size=3),
)
def test_windows_are_told_from_chunks(window, queries, past, padding):
    offset = max(0, past - window + 1)  # a sliding cache keeps so many keys
    call = {
        "batch_size": len(padding),
        "last": past + queries - 1,
        "keys": range(offset, past + queries),
    }
    assert is_window(sliding_window_causal_mask_function(window), window, **call)
    assert is_window(causal_mask_function, window, **call) == (past + queries - window <= offset)
    chunks = chunked_causal_mask_function(window, torch.tensor(padding))
    if is_window(
        chunks, window, **call
    ):  # then it shows what a window shows, to all tokens that are real
        row = torch.arange(len(padding))[:, None, None]
        query = torch.arange(past, past + queries)[:, None]
        key = torch.arange(offset, past + queries)
        real = (key >= torch.tensor(padding)[:, None, None]) & (query >= key)
        same = chunks(row, row, query, key) == (query - key < window)
        assert same[real].all()


@pytest.mark.parametrize("kind", ["window", "chunk"])
def test_masks_of_pairs_are_made_for_chunks_only(kind):
    functions = {
        "window": sliding_window_causal_mask_function(8),
        "chunk": chunked_causal_mask_function(8, torch.zeros(2, dtype=torch.long)),
    }
    real = torch.ones(2, 20, dtype=torch.bool)
    real[1, :5] = False
    mask = padding_mask(2, 20, 20, mask_function=functions[kind], attention_mask=real, local_size=8)
    assert mask.shape == ((2, 20, 8) if kind == "window" else (2, 1, 20, 20))
    if kind == "window":
        assert mask.untyped_storage().nbytes() == 2 * 20  # a view: it takes no more memory
        assert padding_mask(2, 20, 20, attention_mask=mask, local_size=8) is mask


@pytest.mark.parametrize(
    "name", ["Mistral", "Phi3", "Gemma2", "Gemma3", "Qwen2 with windows", "Qwen2Moe"]
)
def test_a_prompt_of_a_sliding_model_makes_no_mask_of_pairs(name, monkeypatch):
    def refuse(**_):
        raise AssertionError("a mask of pairs was made")

    model, ids = make(name), prompt()
    llm.enable(model, prefill={"pattern": "a_shape", "crossover": 0})
    monkeypatch.setattr("dit_accel.llm.attention.sdpa_mask", refuse)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    with torch.no_grad():
        model(ids)
        model(ids, attention_mask=mask)


def attend(policy, q, k, v, mask=None, window=20, causal=True, softcap=None, dropout=0.0):
    options = {"scale": 0.3, "causal": causal, "softcap": softcap, "dropout": dropout}
    return policy.attend(0, q, k, v, mask, window=window, **options)


def test_a_row_whose_real_part_fits_into_the_window_uses_the_pattern():
    policy = Policy(
        PrefillConfig(
            pattern="triangle",
            options={"window": 1, "sink": 0},
            block=16,
            tail=0,
            dense_layers=0,
            crossover=0,
        ),
        1,
    )
    q, k, v = inputs(100, 100)
    mask = torch.ones(2, 100, dtype=torch.bool)
    mask[1, :40] = False
    both = attend(policy, q, k, v, mask, window=60)
    for row, start in ((0, 0), (1, 40)):
        alone = attend(policy, *(x[row : row + 1, :, start:] for x in (q, k, v)), window=60)
        torch.testing.assert_close(both[row : row + 1, :, start:], alone, **CLOSE)
    pattern = policy.patterns[0]
    assert pattern is not None
    counts = policy.counts[0]
    assert counts.sparse == 3
    assert counts.density is not None
    assert counts.density < 0.9


@pytest.mark.parametrize("layers", [0, 1])
def test_sliding_layers_are_exact_and_counted(layers):
    policy = Policy(PrefillConfig(pattern="a_shape", dense_layers=layers, crossover=0), 1)
    q, k, v = inputs(70, 100)
    exact = dense_attention(q, k, v, scale=0.3, window=20)
    torch.testing.assert_close(attend(policy, q, k, v), exact, **CLOSE)
    assert policy.counts[0].density == pytest.approx(window_density(70, 100, 20))
    assert not policy.counts[0].dense


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"softcap": 5.0}, "soft cap"),
        ({"dropout": 0.1}, "dropout"),
        ({"causal": False}, "not causal"),
        ({"mask": torch.ones(2, 1, 70, 100, dtype=torch.bool)}, "sliding window"),
        ({"mask": torch.ones(2, 100).bool().logical_xor(torch.arange(100) == 50)}, "padding in the middle of a row"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_what_is_more_than_a_window_is_dense_and_counted(change, reason):
    policy = Policy(PrefillConfig(pattern="a_shape", dense_layers=0, crossover=0), 1)
    attend(policy, *inputs(70, 100), **change)
    assert policy.counts[0].dense == {reason: 1}


def test_short_prompts_of_sliding_layers_are_dense_and_exact():
    policy = Policy(PrefillConfig(pattern="a_shape", dense_layers=0, crossover=101), 1)
    q, k, v = inputs(70, 100)
    exact = dense_attention(q, k, v, scale=0.3, window=20)
    torch.testing.assert_close(attend(policy, q, k, v), exact, **CLOSE)
    assert policy.counts[0].dense == {"short prompt": 1}
