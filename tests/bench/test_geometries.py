"""Sampling loop and geometries of the speed benchmarks."""

import pytest
import torch

import dit_accel
from dit_accel.bench.geometries import Loop, family_blocks, geometries, large_videos

from .. import random_pipelines

BLOCKS = {"wan": 3, "sd3": 3, "lumina": 3, "lumina2": 4}


@pytest.mark.parametrize("family", BLOCKS)
def test_blocks_of_every_family_are_found(family):
    transformer = getattr(random_pipelines, family)().transformer
    assert len(family_blocks(transformer)) == BLOCKS[family]


def test_a_loop_is_timed_step_by_step_and_can_be_accelerated():
    torch.manual_seed(0)
    loop = Loop(random_pipelines.wan().transformer, guided=False)
    inputs = {
        "hidden_states": torch.randn(1, 4, 3, 16, 16),
        "encoder_hidden_states": torch.randn(1, 12, 24),
    }
    assert len(loop.run(inputs, 4)) == 4
    blocks = {"block_q": 16, "block_k": 16, "crossover": "never"}
    dit_accel.enable(loop, sla={**blocks, "dense_steps": 0, "dense_layers": 0})
    assert len(loop.run(inputs, 3)) == 3
    assert sum(x.sparse_calls for x in dit_accel.summary(loop, strict=True).layers) == 9


@pytest.mark.parametrize("listed", [geometries("cpu"), geometries("cuda"), large_videos()])
def test_inputs_have_a_row_for_each_half_of_guidance_that_shares_a_call(listed):
    assert len({geometry.name for geometry in listed}) == len(listed)
    for geometry in listed:
        inputs = geometry.inputs(torch.device("meta"), torch.bfloat16)
        for name in ("hidden_states", "encoder_hidden_states"):
            assert inputs[name].shape[0] == (2 if geometry.guided else 1)
            assert inputs[name].dtype == torch.bfloat16
