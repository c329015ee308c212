"""Rows with very many blocks, split over several programs, against the torch backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.kernels import SparsePlan, block_sparse_attention
from dit_accel.kernels.block_sparse import triton_forward
from dit_accel.kernels.block_sparse.tiles import Target
from dit_accel.kernels.launch import Launch

from ..kernels.plan_cases import masks
from .cases import cases

INTERPRETER = Target("interpreter", "")


def tensors(plan: SparsePlan, batch: int, heads: int, kv_heads: int, seed: int, dtype):
    g = torch.Generator().manual_seed(seed)
    sizes = ((heads, plan.q_len), (kv_heads, plan.kv_len), (kv_heads, plan.kv_len))
    return [torch.randn(batch, h, n, 16, generator=g).to(dtype) for h, n in sizes]


def split(q, k, v, plan, *, want_lse=True):
    """Return the outputs of the forward pass with segments of 32 tokens, and the names of the kernels."""
    names = []

    def run(launch: Launch) -> None:
        names.append(launch.kernel.__name__)
        launch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_forward, "SPLIT_TOKENS", 32)
        o, lse, _, _ = triton_forward.forward(
            q, k, v, plan, scale=0.3, shared_softmax=False, linear=None, want_lse=want_lse,
            target=INTERPRETER, run=run,
        )  # fmt: skip
    return o, lse, names


@settings(max_examples=cases(4, 4), deadline=None)
@given(
    drawn=masks(100, heads=(1, 2), blocks=(16, 32), batch=2), data=st.data(),
    kv_heads=st.sampled_from([1, 2]), seed=st.integers(0, 99), half=st.booleans(),
)  # fmt: skip
def test_drawn_plans_equal_the_torch_backend(drawn, data, kv_heads, seed, half):
    mask, geometry = drawn
    n_q = mask.shape[2]
    rows = data.draw(st.lists(st.integers(0, n_q - 1), min_size=1, unique=True), label="long rows")
    mask[:, :, rows] = True
    plan = SparsePlan.from_block_mask(mask, **geometry, long_rows=torch.tensor(rows))
    q, k, v = tensors(plan, 2, 2, kv_heads, seed, torch.float16 if half else torch.float32)
    expected, expected_lse = block_sparse_attention(
        q.float(), k.float(), v.float(), plan, scale=0.3, return_lse=True, backend="torch"
    )
    o, lse, _ = split(q, k, v, plan)
    error = 5e-3 if half else 1e-5
    torch.testing.assert_close(o.float(), expected, rtol=error, atol=error)
    torch.testing.assert_close(lse, expected_lse, rtol=error, atol=error)
    again, _, _ = split(q, k, v, plan, want_lse=False)
    assert torch.equal(again, o)


@pytest.mark.parametrize("heads", [1, 4])
def test_two_launches_for_any_number_of_heads_and_rows(heads):
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[:, :, :, 0], mask[:, :, 6:] = True, True
    plan = SparsePlan.from_block_mask(
        mask, block_q=16, block_k=16, q_len=120, kv_len=128, causal=True, long_rows=torch.tensor([6, 7])
    )  # fmt: skip
    q, k, v = tensors(plan, 1, heads, 1, 0, torch.float32)
    o, _, names = split(q, k, v, plan)
    assert names == ["forward_kernel", "merge_kernel"]
    torch.testing.assert_close(o, block_sparse_attention(q, k, v, plan, scale=0.3))


def test_partial_results_keep_to_their_memory(monkeypatch):
    plan = SparsePlan.from_block_mask(
        torch.ones(1, 1, 4, 8, dtype=torch.bool),
        block_q=16, block_k=16, q_len=64, kv_len=128, long_rows=torch.tensor([1, 3]),
    )  # fmt: skip
    q, k, v = tensors(plan, 1, 2, 2, 0, torch.float32)
    expected = block_sparse_attention(q, k, v, plan, scale=0.3)
    row_bytes = 2 * 2 * 16 * 16 * 4
    for segments, kernels in ((3, 2), (2, 2), (1, 1)):  # 4 if memory was no matter
        monkeypatch.setattr(triton_forward, "PART_BYTES", segments * row_bytes + 1)
        o, _, names = split(q, k, v, plan)
        assert len(names) == kernels
        torch.testing.assert_close(o, expected)
