"""Kernels of the query sums against the reference implementation in torch."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.kernels.query_sums import op, sums_kernel, torch_sums
from dit_accel.kernels.query_sums.sums_kernel import sums_launches

from .cases import cases


@pytest.fixture(autouse=True, scope="module")
def few_spans():
    """Use few spans of keys, because a program takes milliseconds in the interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums_kernel, "SPLITS", 2)
        yield


def tensors(batch, kv_heads, group, q_len, k_len, d, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    # As transformers hands them over: [B, L, H, D] in memory.
    q = torch.randn(batch, q_len, kv_heads * group, d, generator=g).transpose(1, 2)
    k = torch.randn(batch, k_len, kv_heads, d, generator=g).transpose(1, 2)
    return (q * 2).to(dtype), k.to(dtype)


def launched(q, k, rows, *, scale, diagonals=False, **options):
    columns = torch.full((*q.shape[:2], k.shape[2]), torch.nan)
    distances = torch.full_like(columns, torch.nan) if diagonals else None
    for launch in sums_launches(q, k, rows, columns, distances, scale=scale, **options):
        launch()
    return columns, distances


sizes = {
    "batch": st.integers(1, 2),
    "kv_heads": st.integers(1, 2),
    "group": st.integers(1, 2),
    "q_len": st.integers(1, 100),
    "before": st.sampled_from([0, 0, 1, 40, 70]),
    "d": st.sampled_from([8, 24, 64, 256]),
    "scale": st.sampled_from([0.2, 0.05, -0.1]),
    "seed": st.integers(0, 99),
}
close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


@settings(max_examples=cases(4, 10), deadline=None)
@given(last=st.integers(1, 100), **sizes)
def test_last_queries_equal_the_formulas(
    batch, kv_heads, group, q_len, before, d, scale, seed, last
):
    q, k = tensors(batch, kv_heads, group, q_len, q_len + before, d, seed)
    rows = range(max(0, q_len - last), q_len)
    actual = launched(q, k, rows, scale=scale, diagonals=True)
    for a, b in zip(actual, torch_sums.last_query_sums(q, k, scale, last), strict=True):
        close(a, b)
    again = launched(q, k, rows, scale=scale, diagonals=True)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@settings(max_examples=cases(4, 10), deadline=None)
@given(data=st.data(), step=st.integers(1, 9), block=st.sampled_from([16, 48, 64, 128]), **sizes)
def test_columns_leave_out_what_is_read(
    data, batch, kv_heads, group, q_len, before, d, scale, seed, step, block
):
    q, k = tensors(batch, kv_heads, group, q_len, q_len + before, d, seed)
    start = data.draw(st.integers(0, q_len - 1), label="start")
    rows = range(start, data.draw(st.integers(start + 1, q_len), label="stop"), step)
    heads = data.draw(st.sampled_from([1, kv_heads, kv_heads * group]), label="heads")
    lead = data.draw(st.sampled_from([1, batch]), label="batch of read")
    blocks = -(-q_len // block), -(-(q_len + before) // block)
    read = torch.rand(lead, heads, *blocks, generator=torch.Generator().manual_seed(seed)) < 0.4
    actual, _ = launched(q, k, rows, scale=scale, read=read, block=block)
    close(actual, torch_sums.column_sums(q, k, rows, scale, read, block))


def test_half_precision_is_summed_in_single():
    q, k = tensors(1, 2, 2, 130, 200, 64, 3, torch.float16)
    exact = torch_sums.last_query_sums(q.double(), k.double(), 0.1, 64)
    for a, b in zip(launched(q, k, range(66, 130), scale=0.1, diagonals=True), exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 4])
def test_operators_take_the_kernels_on_a_gpu_in_as_many_launches_for_all_heads(heads, monkeypatch):
    q, k = tensors(2, heads, 2, 90, 100, 24, 0)
    read = torch.rand(2, heads, 6, 7) < 0.3
    expected = op.last_query_sums(q, k, scale=0.3, last=40)
    columns = op.column_sums(q, k, range(3, 90, 7), scale=0.3, read=read, block=16)
    calls = []
    monkeypatch.setattr(op, "runs_here", lambda x: calls.append(x) or True)
    for name in ("last_query_sums", "column_sums"):
        monkeypatch.setattr(torch_sums, name, None)  # would fail if it was called
    for a, b in zip(op.last_query_sums(q, k, scale=0.3, last=40), expected, strict=True):
        close(a, b)
    close(op.column_sums(q, k, range(3, 90, 7), scale=0.3, read=read, block=16), columns)
    assert len(calls) == 2
    out = torch.empty_like(columns)
    assert len(sums_launches(q, k, range(50, 90), out, out, scale=0.3)) == 3
