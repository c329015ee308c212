"""Every mode of the torch backend against the fp64 definition, through the public functions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.kernels.linear import token_blocks, torch_branch

from ..tolerance import assert_kernel_close
from .attention_cases import assert_results_close, problems


@settings(max_examples=40)
@given(problems(300))
def test_drawn_problems_in_double_precision(problem):
    expected = problem.results(torch.float64, "reference")
    assert_results_close(problem.results(torch.float64, "torch"), expected, 1e-9)


@settings(max_examples=12)
@given(problems(300))
def test_drawn_problems_in_single_precision(problem):
    expected = problem.results(torch.float64, "reference")
    assert_results_close(problem.results(torch.float32, "torch"), expected, 1e-5)


def outputs(problem, dtype, backend):
    """Outputs alone: without gradients, linear branch and mixing are one pass."""
    with torch.no_grad():
        leaves = {name: x.detach() for name, x in problem.leaves(dtype).items()}
        return dict(zip(("o", "lse"), problem.outputs(leaves, backend), strict=False))


@settings(max_examples=20)
@given(problems(300, combines=("proj", "alpha")))
def test_inference_in_double_and_single_precision(problem):
    expected = outputs(problem, torch.float64, "reference")
    assert_results_close(outputs(problem, torch.float64, "torch"), expected, 1e-9)
    assert_results_close(outputs(problem, torch.float32, "torch"), expected, 1e-5)


@settings(max_examples=12)
@given(problems(200, combines=("proj", "alpha")), st.sampled_from([torch.float16, torch.bfloat16]))
def test_inference_in_half_precision(problem, dtype):
    problem = problem.rounded(dtype)
    kinds = ((dtype, "torch"), (torch.float64, "reference"), (dtype, "reference"))
    actual, exact, plain = (outputs(problem, *kind)["o"] for kind in kinds)
    plain = torch.where(plain.isfinite(), plain, exact.to(dtype))
    assert_kernel_close("o", actual, exact, plain)


@settings(max_examples=8)
@given(problems(300, combines=("proj", "alpha")))
def test_small_chunks_of_the_linear_branch_change_nothing(problem):
    whole = problem.results(torch.float64, "torch"), outputs(problem, torch.float64, "torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_blocks, "CHUNK_BYTES", 1)
        patch.setattr(torch_branch, "STATE_BYTES", 2**13)
        parts = problem.results(torch.float64, "torch"), outputs(problem, torch.float64, "torch")
    for actual, expected in zip(parts, whole, strict=True):
        assert_results_close(actual, expected, 1e-12)
