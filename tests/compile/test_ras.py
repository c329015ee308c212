"""Region-adaptive sampling under torch.compile of the repeated blocks: how many graphs, and the same result."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import dit_accel

from ..random_pipelines import FAMILIES, make, relative, run

BLOCKS = {
    "wan": lambda t: t.blocks,
    "sd3": lambda t: t.transformer_blocks,
    "sd35": lambda t: t.transformer_blocks,
    "lumina": lambda t: t.layers,
    "lumina2": lambda t: [*t.noise_refiner, *t.layers],
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_blocks(pipe, family):
    counter = CompileCounterWithBackend("aot_eager")
    if family == "wan":
        pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
    else:  # diffusers names no repeated blocks for the others
        for block in BLOCKS[family](pipe.transformer):
            block.compile(backend=counter, fullgraph=True)
    return counter


def graphs(family, ras):
    """Number of graphs, and the latents of a second run, which must need no new one."""
    torch._dynamo.reset()
    pipe = make(family)
    if ras is not None:
        dit_accel.enable(pipe, ras=ras)
    counter = compile_blocks(pipe, family)
    run(pipe, family)
    first = counter.frame_count
    latents = run(pipe, family)
    assert counter.frame_count == first
    if ras is not None:
        assert dit_accel.summary(pipe, strict=True).ras.ras_steps > 0
    return first, latents


CASES = [(family, "linear") for family in FAMILIES] + [("wan", "hold"), ("wan", "fp8")]


@pytest.mark.parametrize(("family", "kv"), CASES, ids="-".join)
def test_graphs_are_those_of_the_plain_pipeline_times_the_counts(family, kv):
    ras = {"ratio": [(0, 0.7), (0.5, 0.3)], "warmup": 2, "tail": 1, "resets": (6,)}
    ras |= {"kv_cache": "fp8"} if kv == "fp8" else {"kv_predictor": kv}
    plain, _ = graphs(family, None)
    assert plain > 0
    pipe = make(family)
    dit_accel.enable(pipe, ras=ras)
    eager = run(pipe, family)
    counts = {step.active for step in dit_accel.summary(pipe).ras.steps}
    assert len(counts) == 3
    accelerated, latents = graphs(family, ras)
    assert accelerated <= plain * len(counts)
    assert relative(latents, eager) < 1e-5
