"""torch.compile around accelerated transformers, and training of compiled ones."""

import copy

import pytest
import torch

import dit_accel

from ..random_pipelines import make, relative, run
from ..runtime.training_worker import bare_wan, train

SLA = {"topk": 0.3, "block_q": 16, "block_k": 16, "crossover": "never"}
BOTH = {
    "ras": {"ratio": 0.3, "warmup": 2, "tail": 1, "resets": ()},
    "sla": {**SLA, "dense_steps": 1},
}


@pytest.mark.parametrize("first", ["enabled", "compiled"])
def test_compiled_wrappers_hide_nothing(first):
    pipe = make("sd3")
    plain = run(pipe, "sd3")
    dit_accel.enable(pipe, **BOTH)
    accelerated = run(pipe, "sd3")
    if first == "compiled":
        dit_accel.disable(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    if first == "compiled":
        dit_accel.enable(pipe, **BOTH)
    assert relative(run(pipe, "sd3"), accelerated) < 1e-5
    assert dit_accel.summary(pipe.transformer, strict=True).ras.ras_steps > 0
    dit_accel.disable(pipe)
    assert not dit_accel.summary(pipe).enabled
    assert relative(run(pipe, "sd3"), plain) < 1e-5


@pytest.mark.parametrize("how", ["blocks", "whole"])
def test_ten_steps_of_compiled_training_learn_what_eager_ones_learn(how):
    losses, states = {}, {}
    for name in ("eager", "compiled"):
        transformer = bare_wan()
        dit_accel.enable(transformer, sla={**SLA, "combine": "proj", "dense_layers": 1})
        model = transformer
        if name == "compiled" and how == "blocks":
            transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        elif name == "compiled":
            model = torch.compile(transformer, backend="aot_eager")
        losses[name] = train(model, 10)
        states[name] = copy.deepcopy(transformer.state_dict())
        for layer in dit_accel.summary(transformer).layers:
            assert layer.sparse_calls == (10 if layer.scheduled else 0)
    assert losses["compiled"][-1] < 0.9 * losses["compiled"][0]
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-3)
    for name, x in states["eager"].items():
        torch.testing.assert_close(states["compiled"][name], x, rtol=1e-2, atol=1e-3)
