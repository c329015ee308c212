"""Geometries: lengths and rules, checked once and shared by plans."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.kernels import Geometry, SparsePlan
from dit_accel.kernels.geometry import Rules

from .plan_cases import geometries, random_block_mask

SQUARE = {"block_q": 16, "block_k": 16, "q_len": 64, "kv_len": 64}


@given(geometries(200), st.integers(0, 2**16))
def test_a_plan_from_a_geometry_equals_one_from_the_same_arguments(arguments, seed):
    mask = random_block_mask(arguments, 0.5, (1, 1), seed)
    scores = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed))
    geometry = Geometry.of("cpu", **arguments)
    for options in ({"topk": 0.3}, {"top_p": 0.6, "skip": 0.2}):
        plan = SparsePlan.from_scores(scores, geometry=geometry, **options)
        assert plan.equals(SparsePlan.from_scores(scores, **options, **arguments))
    for name in ("q_sizes", "k_sizes"):
        assert torch.equal(getattr(plan, name)(), getattr(geometry, name)())
    assert plan.num_q_blocks == geometry.num_q_blocks == mask.shape[2]
    assert plan.num_k_blocks == geometry.num_k_blocks == mask.shape[3]
    assert plan.positional == geometry.positional == arguments.get("causal", False)


def test_numbers_are_read_once_for_many_plans():
    geometry = Geometry.of("cpu", **SQUARE, q_order=torch.randperm(64)[None])
    scores = torch.randn(1, 1, 4, 4)
    with mock.patch.object(Rules, "check_numbers", side_effect=AssertionError):
        for _ in range(2):
            SparsePlan.from_scores(scores, geometry=geometry, topk=0.5)
        with pytest.raises(AssertionError):
            SparsePlan.from_scores(scores, **SQUARE, q_order=geometry.q_order, topk=0.5)


def test_tensors_become_int32_on_the_device():
    geometry = Geometry.of("meta", **SQUARE, kv_lengths=torch.tensor([64, 3]))
    assert geometry.kv_lengths.dtype == torch.int32
    assert geometry.kv_lengths.device == geometry.device == torch.device("meta")
    assert geometry.ragged
    assert not Geometry.of("cpu", **SQUARE).ragged


BAD = {
    "beside arguments": ("geometry: .*q_len", {"q_len": 64}),
    "on another device": (
        "geometry: .*meta.*cpu",
        {"geometry": Geometry.of("meta", **SQUARE)},
    ),
    "for other lengths": (
        "scores: ",
        {"geometry": Geometry.of("cpu", **{**SQUARE, "kv_len": 65})},
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_geometry_that_does_not_fit_is_refused(case, unchecked):
    message, changes = BAD[case]
    arguments = {"geometry": Geometry.of("cpu", **SQUARE), "topk": 0.5, **changes}
    with pytest.raises(ValueError, match=f"^{message}"):
        SparsePlan.from_scores(torch.zeros(1, 1, 4, 4), **arguments)
