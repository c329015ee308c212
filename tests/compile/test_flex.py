"""FlexAttention under `plan.to_flex()` is block-sparse attention under the plan."""

import pytest
import torch

from dit_accel.kernels import SparsePlan, block_sparse_attention

pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")

RULES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 40, "sink": 5},
    "kv_lengths": {"kv_lengths": torch.tensor([90, 33])},
    "ragged": {
        "q_block_sizes": torch.tensor([16, 3, 16, 0, 6]),
        "k_block_sizes": torch.tensor([16, 16, 5, 0, 16, 9]),
    },
}


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("rule", RULES)
def test_flex_attention_reads_the_same_keys(rule, heads):
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(1, heads, 5, 6, generator=g) < 0.4
    plan = SparsePlan.from_block_mask(
        mask, block_q=16, block_k=16, q_len=70, kv_len=90, **RULES[rule]
    )
    q, k, v = (torch.randn(2, h, n, 16, generator=g) for h, n in ((4, 70), (2, 90), (2, 90)))
    expected = block_sparse_attention(q, k, v, plan, return_lse=True, backend="torch")
    actual = block_sparse_attention(q, k, v, plan, return_lse=True, backend="flex")
    # What FlexAttention gives to a query without any key is its own affair.
    read = plan.to_dense_mask().any(-1).expand(2, 4, -1)
    assert 0 < read.sum() <= read.numel()
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a[read], b[read], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["columns", "q_order"])
def test_what_flex_attention_does_not_know_is_named(name):
    extra = {"columns": torch.tensor([[[3]]]), "q_order": torch.arange(64)[None]}[name]
    plan = SparsePlan.from_block_mask(
        torch.ones(1, 1, 4, 4, dtype=torch.bool),
        block_q=16,
        block_k=16,
        q_len=64,
        kv_len=64,
        **{name: extra},
    )
    with pytest.raises(ValueError, match=f"^{name}: "):
        plan.to_flex()
