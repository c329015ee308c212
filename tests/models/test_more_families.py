"""Invariants of every family that has a file in `random_families`: both methods, alone and together."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import dit_accel
from dit_accel.ras.selection import tile_tokens
from dit_accel.runtime.components import transformers_of
from dit_accel.runtime.install import method_of

from ..random_pipelines import MORE, make, more, randomise, relative, run, state_of
from ..ras.test_cost import PerCall

every_family = pytest.mark.parametrize("family", MORE)
RAS = {"ratio": 0.3, "warmup": 2, "tail": 1, "resets": (5,), "kv_predictor": "linear"}
TILE = (2, 2, 4)


def sla(**changed):
    """Return settings that are sparse in every step and layer."""
    base = {"topk": 0.3, "block_q": 16, "block_k": 16, "order": TILE, "crossover": "never"}
    return {**base, "dense_steps": 0, "dense_layers": 0, **changed}


@every_family
@pytest.mark.combines("ras partial")
def test_ratio_one_equals_plain(family):
    pipe = make(family)
    plain = run(pipe, family, steps=5)
    dit_accel.enable(pipe, ras={"ratio": 1.0, "warmup": 1, "tail": 1, "resets": []})
    assert relative(run(pipe, family, steps=5), plain) < 1e-6
    report = dit_accel.summary(pipe)
    runs = [x.ras.steps for x in report.parts.values()] or [report.ras.steps]
    assert sum(map(len, runs)) == len(report.ras.steps) == 5 * len(runs)
    for steps in runs:
        partial = [not x.dense_calls for x in steps]
        assert partial == [False, *[True] * (len(steps) - 2), False]
        assert all(x.tokens == math.prod(more(family).GRID) for x in steps)


@every_family
@pytest.mark.combines("sla")
def test_reading_everything_equals_plain(family):
    pipe = make(family)
    plain = run(pipe, family, (0, 1), steps=2)
    for combine in ("none", "shared_softmax", "proj"):
        dit_accel.enable(pipe, sla=sla(topk=1.0, combine=combine))
        assert relative(run(pipe, family, (0, 1), steps=2), plain) < 1e-5, combine
        report = dit_accel.summary(pipe, strict=True)
        assert report.overall_density == 1
        assert not report.dense_calls


# Both methods on every family, and each method alone on one family of each kind of layout.
BATCHES = [*((x, "both") for x in MORE), *((x, y) for x in ("flux", "ltx") for y in ("ras", "sla"))]


@pytest.mark.parametrize(("family", "methods"), BATCHES)
@pytest.mark.combines("sla", "ras partial", "sla and ras", "batch > 1")
def test_a_batch_of_two_equals_two_batches_of_one(family, methods):
    pipe = make(family)
    plain = run(pipe, family, (0, 1), steps=5)
    own = max(relative(run(pipe, family, (i,), steps=5)[0], plain[i]) for i in (0, 1))
    settings = {"ras": {**RAS, "selection": "age"}, "sla": sla()}
    dit_accel.enable(pipe, **{k: x for k, x in settings.items() if methods in (k, "both")})
    both = run(pipe, family, (0, 1), steps=5)
    assert relative(both, plain) > 1e-4
    for i in (0, 1):
        assert relative(run(pipe, family, (i,), steps=5)[0], both[i]) < max(10 * own, 2e-6)


@every_family
@pytest.mark.combines("sla and ras")
def test_together_with_every_token_equals_sparse_attention_alone(family):
    pipe = make(family)
    settings = sla(combine="proj", linear_scope="all")
    dit_accel.enable(pipe, sla=settings)
    randomise(pipe)
    alone = run(pipe, family, steps=4)
    dit_accel.disable(pipe)
    ras = {"ratio": 1.0, "warmup": 1, "tail": 1, "resets": [], "kv_predictor": "hold"}
    dit_accel.enable(pipe, sla=settings, ras=ras)
    randomise(pipe)
    assert relative(run(pipe, family, steps=4), alone) < 2e-6


@every_family
@pytest.mark.combines("ras partial")
def test_partial_steps_equal_whole_calls_with_the_tokens_left_out_held(family):
    """The seams gather, cache and complete right: with attention that reads fresh keys of all tokens, a partial step
    returns what a whole call returns at the chosen places."""
    pipe = make(family)
    dit_accel.enable(pipe, ras={**RAS, "predictor": "hold", "correction": 0})
    outputs = {x: [] for x in transformers_of(pipe)}

    def keep(module, args, kwargs, output):
        outputs[module].append(output[0].clone())

    for transformer in outputs:
        transformer.register_forward_hook(keep, with_kwargs=True)
    run(pipe, family, steps=6, guidance=1.0)
    tokens = math.prod(more(family).GRID)
    assert sum(map(len, outputs.values())) == 6 * len(outputs)
    for transformer, seen in outputs.items():
        _check_partial_steps(method_of(transformer, "ras"), seen, family, tokens)


def _check_partial_steps(ras, seen, family, tokens):
    partial = 0
    for step, record in ras.steps.items():
        if record.tiles is None or step == 0 or record.dense_calls:
            continue
        partial += 1
        members = tile_tokens(tokens, ras.plan.schedule.tile, torch.device("cpu"))
        active = torch.zeros(tokens, dtype=torch.bool)
        active[members[record.tiles[0]].flatten()] = True
        now, before = (_by_token(x, family) for x in (seen[step], seen[step - 1]))
        same = now == before
        moved = ~same.flatten(1).all(1)
        assert moved[active].all()
        assert not moved[~active].any()
    assert partial >= 2


def _by_token(x, family):
    """`[N, cell]` of an output `[1, N, C]`, `[1, C, (t,) h, w]` or `[1, t, C, h, w]`."""
    grid, x = more(family).GRID, x[0]
    if x.ndim == 2:
        return x
    x = x.movedim(getattr(more(family), "CHANNEL_AXIS", 1) - 1, 0)
    if x.ndim == 3:
        x = x[:, None]
    for axis, n in zip((1, 3, 5), grid, strict=True):
        x = x.unflatten(axis, (n, -1))
    return x.permute(1, 3, 5, 0, 2, 4, 6).flatten(0, 2)


@every_family
def test_a_run_after_other_sizes_and_an_interrupted_run_equals_a_fresh_run(family):
    pipe = make(family)
    dit_accel.enable(pipe, ras=RAS, sla=sla())
    fresh = run(pipe, family, steps=5)
    for size in more(family).SIZES:
        other = run(pipe, family, steps=5, **size)
        assert torch.isfinite(other).all()
        assert dit_accel.summary(pipe, strict=True).ras.ras_steps > 0

    class Stop(Exception):
        pass

    def callback(pipe, step, timestep, kwargs):
        if step == 3:
            raise Stop
        return kwargs

    with pytest.raises(Stop):
        run(pipe, family, prompts=(1,), steps=5, callback_on_step_end=callback)
    torch.testing.assert_close(run(pipe, family, steps=5), fresh, rtol=0, atol=0)


@every_family
def test_disable_restores_every_module(family):
    pipe = make(family)
    plain = run(pipe, family, steps=2)
    befores = [state_of(x) for x in transformers_of(pipe)]
    dit_accel.enable(pipe, ras=RAS, sla=sla())
    run(pipe, family, steps=4)
    dit_accel.disable(pipe)
    for before, transformer in zip(befores, transformers_of(pipe), strict=True):
        after = state_of(transformer)
        assert before.keys() == after.keys()
        for name, old in before.items():
            assert old.keys() == after[name].keys()
            assert all(old[k] is after[name][k] or old[k] == after[name][k] for k in old)
    torch.testing.assert_close(run(pipe, family, steps=2), plain, rtol=0, atol=0)


@every_family
def test_counted_cost_is_what_torch_counts(family):
    pipe = make(family)
    counter = PerCall(*transformers_of(pipe))
    with sdpa_kernel(SDPBackend.MATH):  # counted as two products
        run(pipe, family, steps=2)
        plain = counter.counts[-1]
        counter.counts.clear()
        dit_accel.enable(pipe, ras={"ratio": 0.5, "warmup": 2, "tail": 1, "resets": ()})
        run(pipe, family, steps=4)
    contexts = more(family).CONTEXTS
    steps = dit_accel.summary(pipe, strict=True).ras.steps
    counted = [
        sum(counter.counts[i : i + contexts]) / contexts / plain
        for i in range(0, len(counter.counts), contexts)
    ]
    for step, share in zip(steps, counted, strict=True):
        assert step.cost == pytest.approx(share, rel=0.01)


@every_family
@pytest.mark.combines("ras forecast")
def test_forecast_steps(family):
    pipe = make(family)
    plain = run(pipe, family, steps=8)
    dit_accel.enable(pipe, ras={"budget": 0.6, "warmup": 2, "tail": 1})
    forecast = run(pipe, family, steps=8)
    ras = dit_accel.summary(pipe, strict=True).ras
    assert ras.cost < 0.8 * len(ras.steps)
    assert 1e-6 < relative(forecast, plain) < 0.5


@every_family
def test_gradients_reach_the_weights_of_sparse_attention(family):
    pipe = make(family)
    arguments = {}

    def keep(module, args, kwargs):
        arguments.update(kwargs, args=args)

    handle = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    run(pipe, family, steps=1)
    handle.remove()
    dit_accel.enable(pipe, sla=sla(combine="proj"))
    randomise(pipe)
    args = arguments.pop("args")
    pipe.transformer(*args, **arguments)[0].square().mean().backward()
    for module in method_of(pipe, "sla").attention.values():
        assert all(x.grad is not None and x.grad.abs().max() > 0 for x in module.parameters())
