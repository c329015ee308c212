"""Rows that read very many blocks, which do not widen the lists of all other rows."""

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_accel.kernels import SparsePlan, block_sparse_attention
from dit_accel.kernels.plan_join import join_heads

from .plan_cases import masks


def both(drawn, rows) -> tuple[SparsePlan, SparsePlan]:
    """Return a plan with long rows, and the same without."""
    mask, geometry = drawn
    mask[:, :, rows] = True
    plan = SparsePlan.from_block_mask(mask, **geometry, long_rows=torch.tensor(rows))
    return plan, SparsePlan.from_block_mask(mask, **geometry)


@settings(max_examples=40)
@given(drawn=masks(150, blocks=(16, 32)), data=st.data())
def test_plans_mean_the_same_with_and_without_long_rows(drawn, data):
    n_q = drawn[0].shape[2]
    rows = data.draw(st.lists(st.integers(0, n_q - 1), min_size=1, unique=True))
    plan, plain = both(drawn, rows)
    plan.check_numbers()
    assert plan.full_kv_indices.shape[-1] <= plain.full_kv_indices.shape[-1]
    for other in (plan, plan.listed()):
        assert torch.equal(other.to_dense_mask(), plain.to_dense_mask())
        assert other.density() == plain.density()
        for a, b in zip(other.transpose(), plain.transpose(), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not plan.listed().has_prefix_rows


def test_outputs_and_gradients_are_the_same():
    g = torch.Generator().manual_seed(0)
    mask = torch.eye(8, dtype=torch.bool)[None, None]
    rules = {"block_q": 16, "block_k": 16, "q_len": 125, "kv_len": 128, "causal": True}
    plan, plain = both((mask, rules), [5, 7])
    assert plan.has_prefix_rows
    assert plan.full_kv_indices.shape[-1] == 1
    q, k, v = (torch.randn(1, 2, n, 8, generator=g).requires_grad_() for n in (125, 128, 128))
    found = []
    for each in (plan, plain):
        o = block_sparse_attention(q, k, v, each)
        found.append((o, *torch.autograd.grad(o.square().sum(), (q, k, v))))
        with torch.no_grad():
            found[-1] += (block_sparse_attention(q, k, v, each),)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def list_bytes(plan: SparsePlan) -> int:
    fields = (getattr(plan, x.name) for x in dataclasses.fields(plan))
    return sum(x.nbytes for x in fields if isinstance(x, Tensor))


def test_lists_of_a_long_prompt_are_small():
    """131,072 tokens in blocks of 128: 64 MiB for 32 heads of which each row reads up to 400 blocks before the last rows."""
    n = 1024
    mask = torch.zeros(1, 1, n, n, dtype=torch.bool)
    mask[..., :396] = True
    mask |= torch.ones(n, n, dtype=torch.bool).triu(-3)
    mask[:, :, -1] = True
    rules = {"block_q": 128, "block_k": 128, "q_len": 128 * n, "kv_len": 128 * n, "causal": True}
    plan = SparsePlan.from_block_mask(mask, **rules, long_rows=torch.tensor([n - 1]))
    assert 32 * list_bytes(plan) <= 64 * 2**20
    # A pattern that all heads share, in blocks of 64 too: Triangle.
    n = 2048
    mask = torch.ones(n, n, dtype=torch.bool).triu(-8)[None, None]
    mask[..., 0], mask[:, :, -2:] = True, True
    rules |= {"block_q": 64, "block_k": 64}
    plan = SparsePlan.from_block_mask(mask, **rules, long_rows=torch.tensor([n - 2, n - 1]))
    assert list_bytes(plan) <= 2**18


def test_joined_plans_keep_rows_without_lists():
    mask = torch.eye(8, dtype=torch.bool)[None, None]
    rules = {"block_q": 16, "block_k": 16, "q_len": 128, "kv_len": 128, "causal": True}
    narrow, _ = both((mask, rules), [7])
    wide = SparsePlan.from_block_mask(torch.ones_like(mask).tril(-1) | mask, **rules)
    assert narrow.full_kv_indices.shape[-1] < wide.full_kv_indices.shape[-1]
    joined = join_heads([narrow, wide], [[1], [0]])
    joined.check_numbers()
    for head, plan in enumerate((wide, narrow)):
        assert torch.equal(joined.to_dense_mask()[:, head], plan.to_dense_mask()[:, 0])
