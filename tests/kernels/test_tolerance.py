import math

import pytest
import torch

from ..tolerance import assert_kernel_close
from .attention_cases import assert_results_close

REFERENCE = torch.linspace(-1, 1, 101, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_accepts_rounding_and_refuses_several_times_more(dtype):
    plain = REFERENCE.to(dtype)
    assert_kernel_close("x", plain, REFERENCE, plain)
    with pytest.raises(AssertionError, match="x: error"):
        assert_kernel_close("x", plain + 20 * torch.finfo(dtype).eps, REFERENCE, plain)


def test_allows_twice_the_error_of_plain_torch_and_no_more():
    plain = REFERENCE.float() + 1e-2
    assert_kernel_close("x", REFERENCE.float() - 1.9e-2, REFERENCE, plain)
    with pytest.raises(AssertionError, match="x: error"):
        assert_kernel_close("x", REFERENCE.float() - 2.1e-2, REFERENCE, plain)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_refuses_a_single_number_that_is_not_finite(bad):
    out = REFERENCE.float()
    out[7] = bad
    with pytest.raises(AssertionError):
        assert_kernel_close("x", out, REFERENCE, REFERENCE.float())


def test_infinity_where_the_reference_has_it_is_right():
    reference = REFERENCE.clone()
    reference[7] = -math.inf
    assert_kernel_close("lse", reference.float(), reference, reference.float())


def test_a_sum_over_rows_is_held_to_the_size_of_its_terms_and_no_other_gradient_is():
    o = torch.ones(2, 4, 50, 25, dtype=torch.float64)  # 2,500 terms a head: a sum of size 50
    expected = {"o": o, "grad_alpha": torch.zeros(4, dtype=torch.float64), "grad_q": o}

    def off(name, error):
        return {**expected, name: expected[name] + error}

    assert_results_close(off("grad_alpha", 4e-4), expected, 1e-5)
    for name, error in (("grad_alpha", 6e-4), ("grad_q", 2e-5), ("o", 2e-5)):
        with pytest.raises(AssertionError, match=f"{name}: error"):
            assert_results_close(off(name, error), expected, 1e-5)
