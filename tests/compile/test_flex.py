"""FlexAttention under `plan.to_flex()`, compiled: alone, as a backend, and inside a compiled caller."""

from unittest import mock

import pytest
import torch
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from dit_accel.kernels import (
    LinearState,
    SparsePlan,
    block_sparse_attention,
    sparse_linear_attention,
)
from dit_accel.kernels.block_sparse import flex_backend

from ..kernels import plain_flex

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
MODES = {
    "none": {"combine": "none"},
    "all": {"combine": "proj", "linear_scope": "all", "proj_weight": torch.eye(16)},
    "marginal": {"combine": "proj", "linear_scope": "marginal", "proj_weight": torch.eye(16)},
    "alpha": {"combine": "alpha", "alpha": torch.full((4,), 0.3)},
}


def problem(rule="plain", heads=4):
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(1, heads, 5, 6, generator=g) < 0.4
    skip = torch.rand(1, heads, 5, 6, generator=g) < 0.3
    plan = SparsePlan.from_block_mask(
        mask, block_q=16, block_k=16, q_len=70, kv_len=90, skip=skip, **RULES[rule]
    )
    q, k, v = (torch.randn(2, h, n, 16, generator=g) for h, n in ((4, 70), (2, 90), (2, 90)))
    return q, k, v, plan


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("rule", RULES)
def test_flex_attention_reads_the_same_keys(rule, heads):
    q, k, v, plan = problem(rule, heads)
    expected = block_sparse_attention(q, k, v, plan, return_lse=True, backend="torch")
    o, aux = flex_attention(
        q, k, v, block_mask=plan.to_flex(), enable_gqa=True, return_aux=AuxRequest(lse=True)
    )
    # What FlexAttention gives to a query without any key is its own affair.
    read = plan.to_dense_mask().any(-1).expand(2, 4, -1)
    assert 0 < read.sum() <= read.numel()
    for a, b in zip((o, aux.lse), expected, strict=True):
        close(a[read], b[read])


# A window is causal too.
@pytest.mark.parametrize("rule", [x for x in RULES if x != "causal"])
def test_the_compiled_backend_is_the_torch_backend(rule):
    q, k, v, plan = problem(rule)
    with mock.patch.object(flex_backend.torch_backend, "forward", side_effect=AssertionError):
        o = block_sparse_attention(q, k, v, plan, backend="flex")
    close(o, block_sparse_attention(q, k, v, plan, backend="torch"))


def test_other_lengths_dtypes_and_strides():
    g = torch.Generator().manual_seed(2)
    for q_len, kv_len, dtype in ((33, 200, torch.float32), (129, 17, torch.bfloat16)):
        mask = torch.rand(1, 1, -(-q_len // 32), -(-kv_len // 16), generator=g) < 0.5
        plan = SparsePlan.from_block_mask(mask, block_q=32, block_k=16, q_len=q_len, kv_len=kv_len)
        q, k, v = (
            torch.randn(1, n, 2, 24, generator=g).to(dtype).transpose(1, 2)
            for n in (q_len, kv_len, kv_len)
        )
        o = block_sparse_attention(q, k, v, plan, backend="flex")
        assert o.is_contiguous()
        expected = block_sparse_attention(q, k, v, plan, backend="torch")
        # Of halves, FlexAttention on a CPU rounds the weights too.
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(o, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", MODES)
def test_one_compiled_kernel_serves_every_mode(mode):
    q, k, v, plan = problem()
    o = sparse_linear_attention(q, k, v, plan, **MODES[mode], backend="flex")
    close(o, sparse_linear_attention(q, k, v, plan, **MODES[mode], backend="torch"))
    assert len(torch._dynamo.eval_frame._debug_get_cache_entry_list(flex_attention)) == 1


def test_the_functions_of_the_means_compile():
    q, k, v, plan = problem("ragged")
    with mock.patch.object(flex_backend, "_attend", plain_flex.attend):
        expected, lse = flex_backend._attend_to_means(q, k, v, plan, 0.25)
    o, _ = flex_backend._attend_to_means(q, k, v, plan, 0.25)
    read = lse > -torch.inf
    assert 0 < read.sum() < read.numel()
    close(o[read], expected[read])


def test_totals_of_the_caller():
    q, k, v, plan = problem()
    options = {**MODES["all"], "state": LinearState.from_keys(k, v)}
    o = sparse_linear_attention(q, k, v, plan, **options, backend="flex")
    close(o, sparse_linear_attention(q, k, v, plan, **options, backend="torch"))


@pytest.mark.parametrize(
    ("mode", "training"), [("marginal", False), ("marginal", True), ("shared_softmax", True)]
)
def test_inside_a_compiled_caller(mode, training):
    *inputs, plan = problem()
    options = MODES.get(mode, {"combine": mode})
    inputs = [x.requires_grad_(training) for x in inputs]

    def attend(q, k, v, backend):
        return sparse_linear_attention(q, k, v, plan, **options, backend=backend)

    o = torch.compile(attend, fullgraph=True)(*inputs, "flex")
    expected = attend(*inputs, "torch")
    close(o, expected)
    if training:
        upstream = torch.randn(o.shape, generator=torch.Generator().manual_seed(3))
        grads = (torch.autograd.grad(x, inputs, upstream) for x in (o, expected))
        for a, b in zip(*grads, strict=True):
            close(a, b)


def test_a_machine_that_cannot_compile_is_told_so():
    q, k, v, plan = problem()
    with (
        torch._inductor.config.patch(
            {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
        ),
        pytest.raises(
            RuntimeError, match=r"^backend='flex': torch.compile could not .* C\+\+ compiler"
        ),
    ):
        block_sparse_attention(q, k, v, plan, backend="flex")


def test_too_many_shapes_are_an_error_and_not_dense_attention():
    *inputs, plan = problem()
    block_sparse_attention(*inputs, plan, backend="flex")
    narrow = [x[..., :8] for x in inputs]
    with (
        torch._dynamo.config.patch(recompile_limit=1),
        pytest.raises(RuntimeError, match=r"^backend='flex': .*[Rr]ecompile"),
    ):
        block_sparse_attention(*narrow, plan, backend="flex")


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
