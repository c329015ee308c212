"""Plans whose lists the query heads of a group share."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.kernels import SparsePlan, block_sparse_attention


@st.composite
def cases(draw):
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    q_len, kv_len = draw(st.integers(1, 70)), draw(st.integers(1, 90))
    causal = draw(st.booleans()) and q_len <= kv_len
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    batch, lists = draw(st.integers(1, 2)), draw(st.sampled_from([1, kv_heads]))
    q, k, v = (
        torch.randn(batch, heads, length, 8, generator=generator, dtype=torch.float64)
        for heads, length in ((kv_heads * group, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    )
    mask = torch.rand(
        draw(st.sampled_from([1, batch])),
        lists,
        -(-q_len // 16),
        -(-kv_len // 16),
        generator=generator,
    )
    columns = None
    if draw(st.booleans()):
        count = draw(st.integers(1, min(5, kv_len)))
        picks = [torch.randperm(kv_len, generator=generator)[:count] for _ in range(lists)]
        columns = torch.stack(picks).sort(-1).values.int()[None]
    plan = SparsePlan.from_block_mask(
        mask < 0.5,
        block_q=16,
        block_k=16,
        q_len=q_len,
        kv_len=kv_len,
        causal=causal,
        columns=columns,
    )
    return q, k, v, plan


@given(case=cases())
def test_shared_lists_equal_lists_for_each_head(case):
    q, k, v, plan = case
    heads = q.shape[1]
    o, lse = block_sparse_attention(q, k, v, plan, return_lse=True)
    mask = plan.for_heads(heads).to_dense_mask()
    wide = (x.repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
    keys, values = wide
    scores = (q @ keys.mT * 8**-0.5).masked_fill(~mask, -torch.inf)
    expected = torch.nan_to_num(scores.softmax(-1)) @ values
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


@given(case=cases())
def test_gradients_through_shared_lists(case):
    q, k, v, plan = case
    inputs = [x.requires_grad_() for x in (q, k, v)]
    block_sparse_attention(*inputs, plan).square().sum().backward()
    ours = [x.grad.clone() for x in inputs]
    for x in inputs:
        x.grad = None
    block_sparse_attention(*inputs, plan.for_heads(q.shape[1])).square().sum().backward()
    for a, x in zip(ours, inputs, strict=True):
        torch.testing.assert_close(a, x.grad)


def test_lists_for_a_number_of_heads_that_does_not_fit_are_refused():
    q, k = torch.randn(1, 6, 32, 8), torch.randn(1, 2, 32, 8)
    plan = SparsePlan.from_block_mask(
        torch.ones(1, 3, 2, 2, dtype=torch.bool), block_q=16, block_k=16, q_len=32, kv_len=32
    )
    with pytest.raises(ValueError, match=r"^plan: .*3 heads"):
        block_sparse_attention(q, k, k, plan)
    with pytest.raises(ValueError, match=r"heads=4: .*3"):
        plan.for_heads(4)
