"""Estimates from a few queries equal loops over heads, queries and keys."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.kernels.query_sums import torch_sums
from dit_accel.llm.prefill.estimate import column_sums, last_query_sums, spread_rows, top_columns

from .prompts import attention, prompts, read_blocks


@given(prompt=prompts(90), last=st.integers(1, 70), most=st.sampled_from([1, 500, 2**24]))
def test_sums_of_the_last_queries(prompt, last, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_sums, "CHUNK_SCORES", most)
        found = last_query_sums(prompt.q, prompt.k, scale=prompt.scale, last=last)
    weights = attention(prompt)[:, :, -last:]
    columns = weights.mean(2)
    diagonals = torch.zeros_like(columns)
    for row in range(weights.shape[2]):
        at = prompt.kv_len - weights.shape[2] + row
        for key in range(at + 1):
            diagonals[:, :, at - key] += weights[:, :, row, key] / weights.shape[2]
    torch.testing.assert_close(found.columns, columns)
    torch.testing.assert_close(found.diagonals, diagonals)
    for sums in found:
        torch.testing.assert_close(sums.sum(-1), torch.ones_like(sums[..., 0]))


@given(prompt=prompts(90), data=st.data(), most=st.sampled_from([1, 500, 2**24]))
def test_column_sums_leave_out_what_is_read(prompt, data, most):
    rows = spread_rows(data.draw(st.integers(1, prompt.q_len)), data.draw(st.integers(1, 9)))
    heads = data.draw(st.sampled_from([1, prompt.k.shape[1], prompt.q.shape[1]]))
    read = torch.rand(1, heads, prompt.num_q_blocks, prompt.num_k_blocks) < 0.4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_sums, "CHUNK_SCORES", most)
        found = column_sums(
            prompt.q, prompt.k, rows, scale=prompt.scale, read=read, block=prompt.block
        )
    if heads > 1:
        read = read.repeat_interleave(prompt.q.shape[1] // heads, 1)
    unread = attention(prompt) * ~read_blocks(prompt, read)
    torch.testing.assert_close(found, unread[:, :, list(rows)].mean(2))


def test_estimates_hold_few_scores_at_a_time(monkeypatch):
    monkeypatch.setattr(torch_sums, "CHUNK_SCORES", 1000)
    q, k = torch.randn(2, 4, 64, 8), torch.randn(2, 2, 64, 8)
    chunks = [weights for _, weights in torch_sums.attention_of(q, k, range(64), 0.3)]
    assert len(chunks) == 64
    assert all(x.numel() <= 1000 for x in chunks)


def test_half_precision_is_summed_in_single():
    q, k = torch.randn(1, 2, 96, 16), torch.randn(1, 1, 96, 16)
    half = last_query_sums(q.bfloat16(), k.bfloat16(), scale=0.25)
    exact = last_query_sums(q, k, scale=0.25)
    assert half.columns.dtype == torch.float32
    for a, b in zip(half, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=2e-3)


@given(stop=st.integers(0, 300), most=st.integers(1, 70))
def test_spread_rows_cover_the_range_evenly(stop, most):
    rows = spread_rows(stop, most)
    assert min(stop, 1) <= len(rows) <= most
    assert all(0 <= x < stop for x in rows)
    assert stop == 0 or stop - rows[-1] <= rows.step


def test_top_columns_are_ascending_and_worth_something():
    sums = torch.tensor([[[0.1, 0.0, 0.5, 0.2, 0.0], [0.0, 0.0, 0.0, 0.3, 0.0]]])
    assert top_columns(sums, 3).tolist() == [[[0, 2, 3], [3, 5, 5]]]
    assert top_columns(sums, 2).tolist() == [[[2, 3], [3, 5]]]
    assert top_columns(sums, 9).tolist() == [[[0, 2, 3, 5, 5], [3, 5, 5, 5, 5]]]
