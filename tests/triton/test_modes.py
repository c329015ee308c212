"""Every mode of the Triton kernels, interpreted on a CPU, against the fp64 definition."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from dit_accel.kernels import LinearState, SparsePlan, sparse_linear_attention
from dit_accel.kernels.block_sparse import problem as unpacked
from dit_accel.kernels.block_sparse import triton_backend, triton_forward
from dit_accel.kernels.launch import Launch

from ..kernels.attention_cases import (
    FEATURE_MAPS,
    SCOPES,
    Problem,
    assert_half_close,
    assert_results_close,
    make_tensors,
    problems,
)
from .cases import LONG, cases


def check(problem: Problem, tolerance: float = 1e-5) -> None:
    expected = problem.results(torch.float64, "reference")
    assert_results_close(problem.results(torch.float32, "triton"), expected, tolerance)


def problem(
    *, q_len=40, kv_len=90, block_q=16, block_k=16, density=0.4, batch=1, heads=2, kv_heads=1,
    d=24, d_v=None, strided=False, geometry=None, **options,
) -> Problem:  # fmt: skip
    g = torch.Generator().manual_seed(0)
    n_q, n_k = -(-q_len // block_q), -(-kv_len // block_k)
    mask = torch.rand(1, heads, n_q, n_k, generator=g) < density
    plan = SparsePlan.from_block_mask(
        mask, block_q=block_q, block_k=block_k, q_len=q_len, kv_len=kv_len, **(geometry or {})
    )
    tensors = make_tensors(g, batch, heads, kv_heads, plan, d, d_v or d, strided)
    d_v = tensors[2].shape[-1]
    if options.get("combine") == "proj":
        options["proj_weight"] = torch.randn(d_v, d_v, generator=g, dtype=torch.float64) / d_v**0.5
    if options.get("combine") == "alpha":
        options["alpha"] = torch.rand(heads, generator=g, dtype=torch.float64)
    return Problem(*tensors, plan, {"combine": "none", **options})


@settings(max_examples=cases(5), suppress_health_check=list(HealthCheck))
@given(problems(110 if LONG else 70))
def test_drawn_problems_forward_and_backward(drawn):
    check(drawn)


@settings(max_examples=cases(3, 4), suppress_health_check=list(HealthCheck))
@given(problems(60))
def test_drawn_problems_in_half_precision_by_the_rule_of_two(drawn):
    assert_half_close(drawn, torch.float16, "triton")


@pytest.mark.parametrize(
    ("combine", "scope", "feature_map"),
    [
        *(("alpha", scope, feature_map) for scope in SCOPES for feature_map in FEATURE_MAPS),
        *(("proj", scope, "softmax") for scope in SCOPES),
    ],
)
def test_linear_branch(combine, scope, feature_map):
    skip = torch.rand(1, 2, 3, 6, generator=torch.Generator().manual_seed(3)) < 0.3
    check(
        problem(
            density=0.2,
            geometry={"skip": skip},
            combine=combine,
            linear_scope=scope,
            feature_map=feature_map,
        )
    )


@pytest.mark.parametrize(
    ("combine", "scope"),
    [("none", "complement"), ("shared_softmax", "complement"), *(("proj", x) for x in SCOPES)],
)
def test_texts_of_different_lengths_behind_an_image(combine, scope):
    """Keys [image, padding to whole blocks, text, padding], as joint attention lays them out."""
    geometry = {
        "k_block_sizes": torch.tensor([16, 16, 6, 16, 16, 10]),
        "kv_lengths": torch.tensor([90, 48, 71]),
        "skip": torch.rand(1, 2, 3, 6, generator=torch.Generator().manual_seed(3)) < 0.3,
    }
    options = {} if combine in ("none", "shared_softmax") else {"linear_scope": scope}
    check(problem(batch=3, geometry=geometry, combine=combine, **options))


@pytest.mark.parametrize(
    ("combine", "scope", "most"),
    [
        ("proj", "marginal", None),
        ("proj", "complement", 3),
        ("alpha", "marginal", 3),
        ("alpha", "complement", None),
    ],
)
def test_rows_that_read_little_subtract_and_others_sum_directly(combine, scope, most, monkeypatch):
    mask, skip = torch.zeros(2, 1, 1, 5, 12, dtype=torch.bool)
    mask[..., [3, 7]] = True
    if most is None:  # two of the rows leave out more than half of the blocks
        mask[:, :, 1, :7] = True
        mask[:, :, 3] = True
    skip[..., 9] = True
    case = problem(q_len=70, block_k=8, heads=1, combine=combine, linear_scope=scope)
    case.plan = SparsePlan.from_block_mask(
        mask, block_q=16, block_k=8, q_len=70, kv_len=90, skip=skip, most=most
    )
    if most is not None:
        case.plan = dataclasses.replace(case.plan, row_bound=most)
    modes = []
    constants = unpacked.Problem.linear_constants
    monkeypatch.setattr(
        unpacked.Problem,
        "linear_constants",
        lambda self: modes.append(self.mode) or constants(self),
    )
    check(case)
    assert set(modes) == {3 if most is None else 2}


MIXES = ("proj", "proj and bias", "alpha", "alpha of blocks")
RULES = ("kv_lengths", "k_block_sizes", "q_order")


@pytest.mark.parametrize(
    ("mix", "scope", "geometry"),
    [
        *((mix, scope, "plain") for mix in MIXES for scope in SCOPES),
        *((mix, "complement", rule) for mix in MIXES[1::2] for rule in RULES),
        *((mix, "marginal", RULES[0]) for mix in MIXES[1::2]),
    ],
)
def test_without_gradients_the_kernel_mixes(mix, scope, geometry):
    g = torch.Generator().manual_seed(5)
    rules = {
        "plain": {},
        "kv_lengths": {"kv_lengths": torch.tensor([33, 0])},
        "k_block_sizes": {"k_block_sizes": torch.tensor([16, 0, 5, 16, 16, 10])},
        "q_order": {"q_order": torch.randperm(40, generator=g)[None]},
    }[geometry]
    mask = torch.rand(2, 2, 3, 6, generator=g) < 0.4
    mask[:, :, 1] = True
    case = problem(batch=2, combine=mix.split()[0], linear_scope=scope)
    rules["skip"] = torch.rand(2, 2, 3, 6, generator=g) < 0.3
    case.plan = SparsePlan.from_block_mask(
        mask, block_q=16, block_k=16, q_len=40, kv_len=90, **rules
    )
    if mix == "proj and bias":
        case.options["proj_bias"] = torch.randn(24, generator=g, dtype=torch.float64)
    if mix == "alpha of blocks":
        case.options["alpha"] = torch.rand(1, 2, 3, generator=g, dtype=torch.float64)
    with torch.no_grad():
        expected = case.outputs(case.leaves(torch.float64), "reference")[0]
        for backend in ("triton", "torch"):
            actual = case.outputs(case.leaves(torch.float32), backend)[0]
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("combine", ["none", "shared_softmax"])
def test_negative_scale(combine):
    check(problem(combine=combine, scale=-0.3))


@pytest.mark.parametrize(
    ("q_len", "combine"), [(1, "none"), (1, "alpha"), (2, "shared_softmax"), (3, "none")]
)
def test_few_queries_over_a_thousand_keys(q_len, combine):
    check(problem(q_len=q_len, kv_len=1000, block_q=64, block_k=64, combine=combine))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d"), [(6, 2, 96), (4, 4, 72), (2, 1, 128), (1, 1, 256)]
)
@pytest.mark.parametrize("combine", ["none", "alpha"])
def test_head_dims_and_groups_of_the_families(heads, kv_heads, d, combine):
    check(
        problem(
            q_len=40,
            kv_len=50,
            block_q=32,
            block_k=32,
            heads=heads,
            kv_heads=kv_heads,
            d=d,
            strided=True,
            combine=combine,
        )
    )


@pytest.mark.parametrize("combine", ["none", "shared_softmax", "proj"])
@pytest.mark.parametrize("density", [0.0, 1.0], ids=["nothing-read", "all-read"])
def test_empty_and_whole_rows(density, combine):
    check(problem(density=density, combine=combine))


@pytest.mark.parametrize(
    ("scope", "dtype"),
    [(SCOPES[0], torch.float16), *((scope, torch.float64) for scope in SCOPES)],
)
def test_a_kept_state_may_have_a_dtype_of_its_own(scope, dtype):
    case = problem(combine="proj", linear_scope=scope)
    state = LinearState.from_keys(case.k, case.v)
    q, k, v, weight = (x.float() for x in (case.q, case.k, case.v, case.options.pop("proj_weight")))
    options = {**case.options, "proj_weight": weight, "backend": "triton"}
    kept = LinearState(state.kv.to(dtype), state.k.to(dtype))
    expected = sparse_linear_attention(q, k, v, case.plan, **options)
    actual = sparse_linear_attention(q, k, v, case.plan, **options, state=kept)
    error = 2e-2 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(actual, expected, rtol=error, atol=error)


@pytest.mark.parametrize("density", [0.8, 1.0])
@pytest.mark.parametrize("scope", ["complement", "marginal"])
def test_rows_that_read_much_subtract_nothing_from_a_kept_state(scope, density):
    case = problem(combine="proj", linear_scope=scope, density=density).rounded(torch.float16)
    q, k, v = (x.half() for x in (case.q, case.k, case.v))
    options = {**case.options, "proj_weight": case.options["proj_weight"].half()}
    state = LinearState.from_keys(k, v)
    actual = sparse_linear_attention(q, k, v, case.plan, **options, state=state, backend="triton")
    expected = case.results(torch.float64, "reference")["o"]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=1e-2)


def test_relu_rows_that_are_all_zero_come_out_as_zero():
    case = problem(combine="alpha", feature_map="relu", linear_scope="all")
    case.q[:, :, ::3] = -case.q[:, :, ::3].abs()
    case.k[:, :, ::2] = -case.k[:, :, ::2].abs()
    check(case)


def test_padding_may_hold_nan():
    geometry = {
        "kv_lengths": torch.tensor([40, 90]),
        "q_block_sizes": torch.tensor([16, 3, 0, 16, 6]),
    }
    case = problem(q_len=70, batch=2, geometry=geometry, combine="alpha")
    expected = case.results(torch.float32, "triton")
    case.k[0, :, 40:] = case.v[0, :, 40:] = torch.nan
    case.q[:, :, 19:32] = torch.nan
    actual = case.results(torch.float32, "triton")
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("which", ["few programs", "named rows"])
@pytest.mark.parametrize("ordered", [False, True], ids=["in-order", "q_order"])
def test_long_rows_are_split_and_merged(which, ordered, monkeypatch):
    monkeypatch.setattr(triton_forward, "SPLIT_TOKENS", 32)
    geometry = {"causal": True, "columns": torch.tensor([[[0, 20, 21, 70]]])}
    if ordered:
        geometry["q_order"] = torch.randperm(70, generator=torch.Generator().manual_seed(2))[None]
    if which == "named rows":
        geometry["long_rows"] = torch.tensor([4, 2])
    case = problem(q_len=70, density=0.8, geometry=geometry)
    kernels = []
    run = Launch.__call__
    monkeypatch.setattr(
        triton_backend.forward,
        "__kwdefaults__",
        {
            **triton_backend.forward.__kwdefaults__,
            "run": lambda launch: kernels.append(launch.kernel.__name__) or run(launch),
        },
    )
    check(case)
    assert "merge_kernel" in kernels


@pytest.mark.parametrize("block", [(10, 25), (48, 20), (128, 128)], ids=str)
def test_blocks_that_are_no_power_of_two(block):
    check(problem(block_q=block[0], block_k=block[1], combine="shared_softmax"))
    check(problem(block_q=block[0], block_k=block[1], geometry={"causal": True}))


def test_strides_that_are_no_multiple_of_eight_beside_some_that_are():
    case = problem(heads=2, kv_heads=2, d=16, d_v=20, strided=True, combine="alpha")
    assert case.v.stride(2) % 8 == 0
    assert case.v.shape[-1] % 8 != 0
    check(case)


def test_strides_of_any_kind():
    case = problem(d=24, strided=True)
    padded = [torch.cat([x, x], -1)[..., : x.shape[-1]] for x in (case.q, case.k, case.v)]
    assert not padded[0].is_contiguous()
    case.q, case.k, case.v = padded
    check(case)


def test_repeats_are_bit_equal():
    case = problem(combine="alpha", heads=4, kv_heads=2)
    first, second = (case.results(torch.float32, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
