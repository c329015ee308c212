"""The flex backend without compilation, and its calls of FlexAttention. Compiled: tests/compile/test_flex.py."""

import math
import warnings
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dit_accel.kernels import SparsePlan, block_sparse_attention, sparse_linear_attention
from dit_accel.kernels.block_sparse import flex_backend
from dit_accel.kernels.lists import block_mask

from . import plain_flex
from .attention_cases import assert_half_close, assert_results_close, problems
from .plan_cases import masks


@st.composite
def known(draw, longest: int):
    """Draw problems without features that FlexAttention does not support."""
    problem = draw(problems(longest))
    assume(problem.plan.columns is None and problem.plan.q_order is None)
    return problem


@settings(max_examples=16)
@given(known(200))
def test_drawn_problems_in_double_precision(problem):
    expected = problem.results(torch.float64, "reference")
    with plain_flex.in_use():
        results = problem.results(torch.float64, "flex")
    assert_results_close(results, expected, 1e-9)


@settings(max_examples=10)
@given(known(200))
def test_drawn_problems_in_single_precision(problem):
    expected = problem.results(torch.float64, "reference")
    with plain_flex.in_use():
        results = problem.results(torch.float32, "flex")
    assert_results_close(results, expected, 1e-5)


@settings(max_examples=6)
@given(known(150), st.sampled_from([torch.float16, torch.bfloat16]))
def test_drawn_problems_in_half_precision(problem, dtype):
    with plain_flex.in_use():
        assert_half_close(problem, dtype, "flex")


@given(masks(200, batch=2))
def test_the_mask_function_alone_says_the_whole_plan(case):
    """FlexAttention's FLASH kernel ignores lists beside a mask function that is always True."""
    mask, geometry = case
    geometry = {n: x for n, x in geometry.items() if n not in ("columns", "q_order")}
    plan = SparsePlan.from_block_mask(mask, **geometry)
    expected = plan.to_dense_mask().expand(2, 3, -1, -1)
    b, h, q, k = (torch.arange(n) for n in expected.shape)
    at = b[:, None, None, None], h[:, None, None], q[:, None], k
    seen = plan.to_flex().mask_mod(*at)
    assert torch.equal(seen.expand_as(expected), expected)


@given(masks(200, batch=2))
def test_the_lists_say_the_same_blocks_by_row_and_by_column(case):
    mask, geometry = case
    geometry = {n: x for n, x in geometry.items() if n not in ("columns", "q_order")}
    plan = SparsePlan.from_block_mask(mask, **geometry)
    flex = plan.to_flex()
    assert torch.equal(flex.to_dense().bool(), plan.to_block_mask())
    n_q, n_k = plan.num_q_blocks, plan.num_k_blocks
    for rows, columns in (("kv", "q"), ("full_kv", "full_q")):
        by_row = block_mask(*lists(flex, rows), n_k)
        assert torch.equal(block_mask(*lists(flex, columns), n_q).mT, by_row)


def lists(flex, name):
    return getattr(flex, f"{name}_num_blocks"), getattr(flex, f"{name}_indices")


def tensors(q_len=70, kv_len=90, d=16):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, h, n, d, generator=g) for h, n in ((4, q_len), (2, kv_len), (2, kv_len))]


def small_plan(block_q=16, block_k=16, **changes):
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(1, 4, -(-70 // block_q), -(-90 // block_k), generator=g) < 0.4
    return SparsePlan.from_block_mask(
        mask, block_q=block_q, block_k=block_k, q_len=70, kv_len=90, **changes
    )


@pytest.mark.parametrize("combine", ["none", "shared_softmax"])
def test_padding_may_hold_nan(combine):
    plan = small_plan(kv_lengths=torch.tensor([90, 33]))
    q, k, v = tensors()
    options = {"combine": combine, "backend": "flex"}
    with plain_flex.in_use():
        clean = sparse_linear_attention(q.requires_grad_(), k, v, plan, **options)
        k[1, :, 33:], v[1, :, 33:] = math.nan, math.nan
        o = sparse_linear_attention(q, k, v, plan, **options)
    assert torch.equal(o, clean)
    (grad,) = torch.autograd.grad(o.sum(), q)
    assert grad.isfinite().all()


@settings(max_examples=6)
@given(known(150))
def test_calls_that_flex_attention_cannot_serve_go_to_the_torch_backend(problem):
    with mock.patch.object(flex_backend, "_attend", side_effect=AssertionError):
        for dtype in (torch.float64, torch.float32):  # with gradients, which need lse
            expected = problem.results(dtype, "torch")
            assert_results_close(problem.results(dtype, "flex"), expected, 0)


@pytest.mark.parametrize("function", [block_sparse_attention, sparse_linear_attention])
@pytest.mark.parametrize("name", ["columns", "q_order"])
def test_what_flex_attention_does_not_know_is_named_before_any_work(function, name):
    extra = {"columns": torch.tensor([[[3]]]), "q_order": torch.arange(70)[None]}[name]
    plan = small_plan(**{name: extra})
    options = {} if function is block_sparse_attention else {"combine": "none"}
    with (
        mock.patch.object(flex_backend, "forward", side_effect=AssertionError),
        pytest.raises(ValueError, match=f"^{name}: "),
    ):
        function(*tensors(), plan, backend="flex", **options)


# -- what would be asked of a GPU ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "d", "dtype", "expected"),
    [
        ((128, 128), 128, torch.bfloat16, {}),
        ((256, 128), 128, torch.float32, {}),
        ((128, 64), 128, torch.bfloat16, {"BLOCK_N": 64}),
        ((64, 64), 64, torch.float16, {"BLOCK_M": 64, "BLOCK_N": 64}),
        ((64, 64), 64, torch.float32, {"BLOCK_M": 32, "BLOCK_N": 32}),
        ((64, 64), 256, torch.bfloat16, {"BLOCK_M": 32, "BLOCK_N": 32}),
        ((48, 192), 64, torch.bfloat16, {"BLOCK_M": 16, "BLOCK_N": 64}),
    ],
)
def test_tiles_divide_the_blocks(blocks, d, dtype, expected):
    q = torch.empty(1, 1, 1, d, dtype=dtype)
    options = flex_backend.triton_options(q, q, blocks)
    assert options == {"FORCE_USE_FLEX_ATTENTION": True, **expected}
    for name, block in zip(("BLOCK_M", "BLOCK_N"), blocks, strict=True):
        assert block % options.get(name, 128) == 0


def fits(capability, blocks=(256, 128), d=128, dtype=torch.bfloat16, *, cuda=True, installed=True):
    q = mock.Mock(is_cuda=cuda, dtype=dtype, shape=(1, 1, 1, d))
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
        mock.patch.object(torch.version, "hip", None),
        mock.patch.object(flex_backend, "_flash_installed", return_value=installed),
    ):
        plan = mock.Mock(block_q=blocks[0], block_k=blocks[1])
        return flex_backend.flash_fits(q, q, plan)


@pytest.mark.parametrize("call", [((10, 0),), ((10, 3),), ((9, 0), (128, 128))])
def test_flash_is_chosen_where_it_fits(call, unchecked):
    assert fits(*call)


@pytest.mark.parametrize(
    ("call", "options"),
    [
        (((10, 0), (128, 128)), {}),
        (((10, 0), (256, 64)), {}),
        (((8, 0), (128, 128)), {}),
        (((12, 0),), {}),
        (((10, 0),), {"d": 80}),
        (((10, 0),), {"dtype": torch.float32}),
        (((10, 0),), {"cuda": False}),
        (((10, 0),), {"installed": False}),
    ],
)
def test_flash_is_not_chosen_elsewhere(call, options, unchecked):
    assert not fits(*call, **options)


@pytest.mark.parametrize(("version", "expected"), [("2.11.0", False), ("2.13.1+cu130", True)])
def test_flash_is_not_asked_of_a_torch_with_another_lse(version, expected):
    flex_backend._flash_installed.cache_clear()
    with (
        mock.patch.object(torch, "__version__", version),
        mock.patch("importlib.util.find_spec", return_value=object()),
    ):
        assert flex_backend._flash_installed() is expected
    flex_backend._flash_installed.cache_clear()


def test_flash_that_fails_is_named_once_and_left_alone():
    asked = []

    def function(kernel_options):
        asked.append(kernel_options)
        if "BACKEND" in kernel_options:
            raise RuntimeError("no such tile")
        return "result"

    with mock.patch.object(flex_backend, "_flash_failed", False):
        with pytest.warns(UserWarning, match="no such tile"):
            assert flex_backend._flash_or(function, {"BLOCK_N": 64}) == "result"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert flex_backend._flash_or(function, {"BLOCK_N": 64}) == "result"
    assert asked == [{"BACKEND": "FLASH"}, {"BLOCK_N": 64}, {"BLOCK_N": 64}]
