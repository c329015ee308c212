"""Linear branch together with the sparse branch: gradients, released formulas, absence of NaN, bad input."""

import math
import os
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.kernels import (
    LinearState,
    SparsePlan,
    block_scores,
    block_sparse_attention,
    sparse_linear_attention,
)

from .attention_cases import FEATURE_MAPS, SCOPES

D = 6


def inputs(*lengths, heads=(2, 1), d=D, seed=0):
    g = torch.Generator().manual_seed(seed)
    q_len, kv_len = lengths
    return [
        torch.randn(2, h, n, d, generator=g, dtype=torch.float64)
        for h, n in ((heads[0], q_len), (heads[1], kv_len), (heads[1], kv_len))
    ]


def small_plan(**changes) -> SparsePlan:
    mask = torch.tensor([[True, False, False, True], [False, True, False, False], [True] * 4])
    skip = torch.tensor([[False, True, False, False]]).expand(3, 4)
    geometry = {"block_q": 2, "block_k": 3, "q_len": 5, "kv_len": 11, "skip": skip[None, None]}
    return SparsePlan.from_block_mask(mask[None, None], **geometry | changes)


def extras(combine: str) -> dict:
    g = torch.Generator().manual_seed(5)
    if combine == "alpha":
        return {"alpha": torch.rand(2, generator=g, dtype=torch.float64)}
    return {
        "proj_weight": torch.randn(D, D, generator=g, dtype=torch.float64),
        "proj_bias": torch.randn(D, generator=g, dtype=torch.float64),
    }


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("combine", ["proj", "alpha"])
def test_gradcheck(combine, scope, feature_map):
    plan = small_plan(kv_lengths=torch.tensor([11, 7]))
    tensors = extras(combine)
    leaves = [x.requires_grad_() for x in (*inputs(5, 11), *tensors.values())]

    def run(q, k, v, *rest):
        return sparse_linear_attention(
            q, k, v, plan, combine=combine, linear_scope=scope, feature_map=feature_map,
            **dict(zip(tensors, rest, strict=True)),
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


# -- what the public implementations compute, block by block ---------------------------------------


def phi(x, feature_map):
    if feature_map == "softmax":
        return x.exp() / x.exp().sum(-1, keepdim=True)
    return torch.where(x > 0, x + 1, x.exp()) if feature_map == "elu" else x.clamp(min=0)


def released(q, k, v, mask, block, weight, feature_map, scope):
    """Return O_s + Proj(O_l), with all keys and an epsilon of 1e-5, or with unread blocks and no epsilon."""
    f_q, f_k = phi(q, feature_map), phi(k, feature_map)
    out = torch.zeros_like(q)
    for h in range(q.shape[1]):
        for i in range(mask.shape[2]):
            rows = slice(i * block, (i + 1) * block)
            read = mask[0, h, i].repeat_interleave(block)[: k.shape[2]]
            scores = q[:, h, rows] @ k[:, h, read].mT / math.sqrt(q.shape[-1])
            o_s = scores.softmax(-1) @ v[:, h, read]
            linear = torch.ones_like(read) if scope == "all" else ~read
            kv = f_k[:, h, linear].mT @ v[:, h, linear]
            total = f_q[:, h, rows] @ f_k[:, h, linear].sum(1)[..., None]
            o_l = f_q[:, h, rows] @ kv / (total + 1e-5 if scope == "all" else total)
            out[:, h, rows] = o_s + o_l @ weight.mT
    return out


@pytest.mark.parametrize("feature_map", ["softmax", "elu"])
@pytest.mark.parametrize("scope", ["all", "complement"])
def test_both_released_variants_of_sla_are_reproduced(scope, feature_map):
    g = torch.Generator().manual_seed(3)
    mask = torch.rand(1, 3, 5, 5, generator=g) < 0.4
    mask[..., 0], mask[..., 4] = True, False  # every row reads one and leaves one
    plan = SparsePlan.from_block_mask(mask, block_q=16, block_k=16, q_len=75, kv_len=75)
    weight = torch.randn(D, D, generator=g, dtype=torch.float64)
    ours = [x.requires_grad_() for x in (*inputs(75, 75, heads=(3, 3)), weight.clone())]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    o = sparse_linear_attention(
        *ours[:3], plan, combine="proj", proj_weight=ours[3], linear_scope=scope,
        feature_map=feature_map,
    )  # fmt: skip
    expected = released(*theirs[:3], mask, 16, theirs[3], feature_map, scope)
    torch.testing.assert_close(o, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn(o.shape, generator=g, dtype=o.dtype)
    grads = torch.autograd.grad(o, ours, upstream)
    for a, b in zip(grads, torch.autograd.grad(expected, theirs, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_all_and_complement_differ_from_each_other():
    tensors, plan = inputs(5, 11), small_plan()
    results = [
        sparse_linear_attention(
            *tensors, plan, combine="proj", linear_scope=scope, **extras("proj")
        )
        for scope in SCOPES
    ]
    for i in range(3):
        assert (results[i] - results[i - 1]).abs().max() > 0.01


def test_alpha_of_one_is_the_sparse_branch_and_of_zero_the_linear_one():
    q, k, v = inputs(5, 11)
    plan = small_plan()
    options = {"combine": "alpha", "linear_scope": "all"}
    one = sparse_linear_attention(q, k, v, plan, **options, alpha=torch.ones(2))
    torch.testing.assert_close(one, block_sparse_attention(q, k, v, plan))
    zero = sparse_linear_attention(q, k, v, plan, **options, alpha=torch.zeros(2))
    f_q, f_k = phi(q, "softmax"), phi(k, "softmax")
    total = f_q @ f_k.sum(2)[..., None] + 1e-5
    torch.testing.assert_close(zero, f_q @ (f_k.mT @ v) / total)


def test_a_row_that_reads_everything_has_no_linear_branch():
    tensors, plan = inputs(5, 11), small_plan()
    sparse = block_sparse_attention(*tensors, plan)
    for scope in ("complement", "marginal"):
        mixed = sparse_linear_attention(
            *tensors, plan, combine="alpha", alpha=torch.full((2,), 0.3), linear_scope=scope
        )
        torch.testing.assert_close(mixed[:, :, 4:], sparse[:, :, 4:])
        assert not torch.allclose(mixed[:, :, :4], sparse[:, :, :4])
    proj = extras("proj")
    with_bias = sparse_linear_attention(*tensors, plan, combine="proj", **proj)
    torch.testing.assert_close(with_bias[:, :, 4:], sparse[:, :, 4:] + proj["proj_bias"])


# -- never NaN -------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    st.integers(1, 4096), st.integers(1, 4096), st.floats(1e-6, 1.0),
    st.sampled_from(FEATURE_MAPS), st.sampled_from(SCOPES),
    st.sampled_from(["shared_softmax", "proj", "alpha"]), st.sampled_from([64, 128]),
    st.sampled_from([-1.0, 0.0, 1.0, 100.0]),
)  # fmt: skip
def test_any_length_and_topk_gives_finite_outputs_and_gradients(
    q_len, kv_len, topk, feature_map, scope, combine, block, size
):
    g = torch.Generator().manual_seed(q_len)
    q, k, v = (torch.randn(1, 1, n, 8, generator=g) for n in (q_len, kv_len, kv_len))
    # Negative everywhere: relu features are all zero.
    q, k = (x * size if size >= 0 else -x.abs() for x in (q, k))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    blocks = {"block_q": block, "block_k": 64}
    plan = SparsePlan.from_scores(
        block_scores(q, k, **blocks), topk=topk, skip=0.1, q_len=q_len, kv_len=kv_len, **blocks
    )
    options: dict = {"combine": combine}
    if combine != "shared_softmax":
        options |= {"feature_map": feature_map, "linear_scope": scope}
    if combine == "proj":
        options["proj_weight"] = torch.eye(8)
    if combine == "alpha":
        options["alpha"] = torch.full((1,), 0.5)
    o = sparse_linear_attention(q, k, v, plan, **options)
    assert o.isfinite().all()
    for grad in torch.autograd.grad(o.sum(), (q, k, v)):
        assert grad.isfinite().all()


# -- autocast --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("combine", ["none", "shared_softmax", "proj", "alpha"])
def test_autocast_is_attention_of_the_inputs_in_its_dtype(dtype, combine):
    q, k, v = (x.float().requires_grad_() for x in inputs(5, 11))
    plan, options = small_plan(), {"combine": combine}
    if combine in ("proj", "alpha"):
        options |= {name: x.float() for name, x in extras(combine).items()}
    half = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    expected = sparse_linear_attention(*half, plan, **options)
    expected_grads = torch.autograd.grad(expected.float().sum(), half)
    with torch.autocast("cpu", dtype=dtype):
        o = sparse_linear_attention(q, k, v.to(dtype), plan, **options)
        grads = torch.autograd.grad(o.float().sum(), (q, k))
    assert o.dtype == dtype
    torch.testing.assert_close(o, expected)
    for a, b in zip(grads, expected_grads, strict=False):
        torch.testing.assert_close(a, b.float())


def test_scores_and_totals_keep_their_precision_under_autocast():
    q, k, v = (x.float() for x in inputs(64, 64))
    scores = block_scores(q, k, block_q=16, block_k=16)
    state = LinearState.from_keys(k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(block_scores(q, k, block_q=16, block_k=16), scores)
        again = LinearState.from_keys(k, v)
        again.update_(k[:, :, :4], v[:, :, :4], k[:, :, :4], v[:, :, :4])
    torch.testing.assert_close(again.kv, state.kv)


# -- bad input -------------------------------------------------------------------------------------

X = torch.zeros(2, 4, 64, 16)
SQUARE = {"block_q": 16, "block_k": 16, "q_len": 64, "kv_len": 64}
ALL = torch.ones(1, 1, 4, 4, dtype=torch.bool)
PLAN = SparsePlan.from_block_mask(ALL, **SQUARE)
EYE = torch.eye(16)
WIDE = {name: torch.zeros(2, 4, 64, 264) for name in ("q", "k", "v")}
STATE = LinearState.from_keys(X, X)
BAD = {
    "head_dim above 256": ("q", {**WIDE, "combine": "none"}),
    "q that is no tensor": ("q", {"q": None}),
    "plan that is a mask": ("plan", {"plan": ALL}),
    "scale of zero": ("scale", {"scale": 0.0}),
    "scale of nan": ("scale", {"scale": math.nan}),
    "infinite scale": ("scale", {"scale": math.inf}),
    "unknown backend": ("backend", {"backend": "cuda"}),
    "unknown feature_map": ("feature_map", {"combine": "proj", "proj_weight": EYE, "feature_map": "hedgehog"}),
    "unknown linear_scope": ("linear_scope", {"combine": "proj", "proj_weight": EYE, "linear_scope": "none"}),
    "proj without a weight": ("proj_weight", {"combine": "proj"}),
    "weight of another shape": ("proj_weight", {"combine": "proj", "proj_weight": EYE[:8]}),
    "weight elsewhere": ("proj_weight", {"combine": "proj", "proj_weight": EYE.to("meta")}),
    "weight that nobody uses": ("proj_weight", {"combine": "alpha", "alpha": torch.ones(4), "proj_weight": EYE}),
    "bias of another shape": ("proj_bias", {"combine": "proj", "proj_weight": EYE, "proj_bias": EYE}),
    "alpha that is missing": ("alpha", {"combine": "alpha"}),
    "alpha of too few heads": ("alpha", {"combine": "alpha", "alpha": torch.ones(3)}),
    "alpha of too few blocks": ("alpha", {"combine": "alpha", "alpha": torch.ones(1, 4, 3)}),
    "alpha that nobody uses": ("alpha", {"alpha": torch.ones(4)}),
    "state that nobody uses": ("state", {"state": STATE}),
    "state of another map": (
        "state", {"combine": "proj", "proj_weight": EYE, "state": STATE, "feature_map": "elu"}
    ),
    "state of other heads": (
        "state", {"combine": "proj", "proj_weight": EYE, "state": LinearState.from_keys(X[:, :2], X[:, :2])}
    ),
    "state of another device": (
        "state",
        {"combine": "proj", "proj_weight": EYE, "state": LinearState(STATE.kv.to("meta"), STATE.k.to("meta"))},
    ),
    "state with a gradient": (
        "state",
        {"combine": "proj", "proj_weight": EYE, "state": LinearState(STATE.kv.clone().requires_grad_(), STATE.k)},
    ),
    "state while training": (
        "state", {"combine": "proj", "proj_weight": EYE, "state": STATE, "q": X.clone().requires_grad_()}
    ),
    "columns with a summary": (
        "combine", {"plan": SparsePlan.from_block_mask(ALL, **SQUARE, columns=torch.tensor([[[3]]]))}
    ),
    "causal with a linear branch": (
        "combine",
        {"combine": "proj", "proj_weight": EYE, "plan": SparsePlan.from_block_mask(ALL, **SQUARE, causal=True)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_named(case, unchecked):
    name, changes = BAD[case]
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        sparse_linear_attention(**{"q": X, "k": X, "v": X, "plan": PLAN, **changes})


def test_forward_mode_is_refused_and_not_silently_zero(unchecked):
    with pytest.raises(ValueError, match=r"^q: .*forward-mode"):
        torch.func.jvp(lambda q: block_sparse_attention(q, X, X, PLAN), (X,), (X,))


@pytest.mark.parametrize("value", [-1, 4, 2**31 - 1])
def test_an_index_out_of_range_is_refused_before_anything_is_read(value):
    plan = SparsePlan.from_block_mask(ALL, **SQUARE)
    plan.full_kv_indices[0, 0, 1, 2] = value
    for function in (block_sparse_attention, sparse_linear_attention):
        with pytest.raises(ValueError, match=r"^full_kv_indices\b"):
            function(X, X, X, plan)


def test_numbers_are_checked_on_other_devices_in_debug_mode_only():
    x = X.to("meta")
    with mock.patch.object(SparsePlan, "check_numbers") as check:
        plan = PLAN.to("meta")
        block_sparse_attention(x, x, x, plan, backend="torch")
        check.assert_not_called()
        with mock.patch.dict(os.environ, DIT_ACCEL_DEBUG="1"):
            block_sparse_attention(x, x, x, plan, backend="torch")
        check.assert_called_once()


def test_triton_on_a_cpu_is_refused_by_name():
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="0"),
        pytest.raises(ValueError, match=r"^backend='triton': .*float32 on cpu"),
    ):
        block_sparse_attention(X, X, X, PLAN, backend="triton")
