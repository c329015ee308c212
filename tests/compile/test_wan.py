"""Further models of the Wan family under torch.compile of their blocks."""

import pytest
import torch

import dit_accel

from ..random_pipelines import compile_blocks, make, relative, run

RAS = {"ratio": 0.5, "warmup": 2, "tail": 1, "resets": ()}
SLA = {"topk": 0.5, "block_q": 16, "block_k": 16, "crossover": "never", "dense_layers": 0}


@pytest.mark.parametrize("family", ["wan22", "wan22_ti2v", "wan_vace"])
def test_compiled_blocks_equal_eager_ones_and_are_compiled_once(family):
    pipe = make(family)
    dit_accel.enable(pipe, ras=RAS, sla={**SLA, "dense_steps": 1})
    eager = run(pipe, family, steps=6)
    dit_accel.summary(pipe, strict=True)
    torch._dynamo.reset()
    counter = compile_blocks(pipe, family, "eager")
    first = run(pipe, family, steps=6)
    assert relative(first, eager) < 1e-5
    frames = counter.frame_count
    assert frames > 0
    torch.testing.assert_close(run(pipe, family, steps=6), first, rtol=0, atol=0)
    assert counter.frame_count == frames
