"""Every mode of the torch backend against the fp64 definition, through the public functions."""

import torch
from hypothesis import given, settings

from .attention_cases import assert_results_close, problems


@settings(max_examples=250)
@given(problems(300))
def test_drawn_problems_in_double_precision(problem):
    expected = problem.results(torch.float64, "reference")
    assert_results_close(problem.results(torch.float64, "torch"), expected, 1e-9)


@settings(max_examples=60)
@given(problems(300))
def test_drawn_problems_in_single_precision(problem):
    expected = problem.results(torch.float64, "reference")
    assert_results_close(problem.results(torch.float32, "torch"), expected, 1e-5)
