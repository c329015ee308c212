"""Region-adaptive sampling under torch.compile of the repeated blocks: how many graphs, and the same result."""

import pytest
import torch

import dit_accel

from ..random_pipelines import FAMILIES, compile_blocks, make, relative, run
from .test_sla import PLAIN

# `test_sla` counts the graphs of the other plain pipelines.
PLAIN = {**PLAIN, "sd3": 2}


def graphs(family, ras):
    """Return the number of graphs and the latents of a second run, which must not compile a new one."""
    torch._dynamo.reset()
    pipe = make(family)
    if ras is not None:
        dit_accel.enable(pipe, ras=ras)
    # Tracing finds all breaks. AOTAutograd takes as long again, and is tested with one family.
    counter = compile_blocks(pipe, family, "aot_eager" if family == "wan" else "eager")
    run(pipe, family)
    first = counter.frame_count
    latents = run(pipe, family)
    assert counter.frame_count == first
    if ras is not None:
        assert dit_accel.summary(pipe, strict=True).ras.ras_steps > 0
    return first, latents


def test_number_of_plain_graphs():
    assert graphs("sd3", None)[0] == PLAIN["sd3"]


CASES = [(family, "linear") for family in FAMILIES] + [("wan", "hold"), ("wan", "fp8")]


@pytest.mark.parametrize(("family", "kv"), CASES, ids="-".join)
@pytest.mark.combines("ras partial", "compile")
def test_graphs_are_those_of_the_plain_pipeline_times_the_counts(family, kv):
    ras = {"ratio": [(0, 0.7), (0.5, 0.3)], "warmup": 2, "tail": 1, "resets": (6,)}
    ras |= {"kv_cache": "fp8"} if kv == "fp8" else {"kv_predictor": kv}
    pipe = make(family)
    dit_accel.enable(pipe, ras=ras)
    eager = run(pipe, family)
    counts = {step.active for step in dit_accel.summary(pipe).ras.steps}
    assert len(counts) == 3
    accelerated, latents = graphs(family, ras)
    assert 0 < accelerated <= PLAIN[family] * len(counts)
    assert relative(latents, eager) < 1e-5


FORECAST = {"budget": 0.6, "warmup": 2, "tail": 1}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.combines("ras forecast", "compile")
def test_forecast_steps_need_no_graph(family):
    pipe = make(family)
    dit_accel.enable(pipe, ras=FORECAST)
    eager = run(pipe, family)
    accelerated, latents = graphs(family, FORECAST)
    assert accelerated == PLAIN[family]
    assert relative(latents, eager) < 1e-5


@pytest.mark.parametrize("first", ["enabled", "compiled"])
def test_a_compiled_transformer_is_not_called_for_a_forecast(first):
    from torch._dynamo.testing import CompileCounterWithBackend

    pipe = make("wan")
    inner = pipe.transformer
    inner.blocks = inner.blocks[:1]  # tracing the whole transformer takes long
    dit_accel.enable(pipe, ras=FORECAST)
    eager = run(pipe, "wan")
    if first == "compiled":
        dit_accel.disable(pipe)
    counter = CompileCounterWithBackend("eager")
    pipe.transformer = torch.compile(inner, backend=counter)
    if first == "compiled":
        dit_accel.enable(pipe, ras=FORECAST)
    calls = []
    inner.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    assert relative(run(pipe, "wan"), eager) < 1e-5
    assert dit_accel.summary(pipe, strict=True).ras.forecast_steps == 4
    assert counter.frame_count > 0, "the transformer was not compiled"
    assert len(calls) == 2 * 6
