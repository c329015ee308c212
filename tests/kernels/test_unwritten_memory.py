"""NaN fill of conftest.py: it applies to code of dit_accel only."""

import pytest
import torch

import dit_accel.kernels.plan as module

ALLOCATIONS = ["torch.empty(9)", "torch.empty_like(x)", "x.new_empty(9)"]


def run_inside(package: str, code: str) -> torch.Tensor:
    names = {"__name__": package, "torch": torch, "x": torch.zeros(9)}
    return eval(code, names)


@pytest.mark.parametrize("code", ALLOCATIONS)
def test_an_empty_float_tensor_made_by_dit_accel_is_nan(code):
    assert run_inside(module.__name__, code).isnan().all()


@pytest.mark.parametrize("code", ALLOCATIONS)
def test_other_callers_get_what_torch_gives(code):
    assert not run_inside("dit_accelerate", code).isnan().all()


def test_integers_stay_as_they_are():
    assert run_inside("dit_accel", "torch.empty(3, dtype=torch.long)").dtype == torch.long
