"""Forecast steps: the transformer is not called, and the pipeline works as before."""

import functools
import pickle

import pytest
import torch
from torch import nn

import dit_accel
from dit_accel.runtime.install import installation_of, method_of

from ..random_pipelines import BLOCKS, FAMILIES, SCHEDULERS, make, relative, run, state_of
from .definition import Definition

CASES = [
    (family, solver)
    for family in FAMILIES
    for solver in SCHEDULERS
    if family != "lumina2" or solver in ("euler", "unipc")
]
every_case = pytest.mark.parametrize(("family", "solver"), CASES)
every_family = pytest.mark.parametrize("family", FAMILIES)
FORECAST = {"budget": 0.6, "warmup": 2, "tail": 1}


def modes(pipe):
    return [x.mode for x in dit_accel.summary(pipe).ras.steps]


@every_case
@pytest.mark.combines("ras forecast")
def test_equals_the_definition(family, solver):
    pipe = make(family, solver)
    dit_accel.enable(pipe, ras=FORECAST)
    latents = run(pipe, family, prompts=(0, 1))
    chosen, levels = modes(pipe), method_of(pipe, "ras").plan.levels.tolist()
    assert "forecast" in chosen
    dit_accel.disable(pipe)
    Definition(pipe.transformer, chosen, levels)
    assert relative(run(pipe, family, prompts=(0, 1)), latents) < 2e-5


@every_case
def test_the_transformer_is_not_called(family, solver):
    pipe = make(family, solver)
    plain = run(pipe, family)
    dit_accel.enable(pipe, ras=FORECAST)
    calls = []
    block = BLOCKS[family](pipe.transformer)[0]
    hook = block.register_forward_hook(lambda *_: calls.append(1))
    result = run(pipe, family)
    hook.remove()
    report = dit_accel.summary(pipe, strict=True).ras
    steps = len(report.steps)
    contexts = 2 if family in ("wan", "lumina2") else 1
    assert len(calls) == contexts * (steps - report.forecast_steps)
    assert report.cost == pytest.approx(steps - report.forecast_steps)
    assert report.cost <= 0.6 * steps + 1e-6
    assert report.kv_bytes == 0
    assert 0 < relative(result, plain) < 0.5


@every_family
@pytest.mark.combines("ras forecast", "batch > 1")
def test_a_batch_of_two_equals_two_batches_of_one(family):
    pipe = make(family)
    plain = run(pipe, family, (0, 1))
    own = max(relative(run(pipe, family, (i,))[0], plain[i]) for i in (0, 1))
    dit_accel.enable(pipe, ras=FORECAST)
    both = run(pipe, family, (0, 1))
    for i in (0, 1):
        assert relative(run(pipe, family, (i,))[0], both[i]) < max(10 * own, 1e-6)


@every_family
@pytest.mark.parametrize("ras", [FORECAST, {**FORECAST, "ratio": 0.3}], ids=["forecast", "mixed"])
def test_disable_restores_every_module_and_the_class(family, ras):
    pipe = make(family)
    plain = run(pipe, family)
    before, cls = state_of(pipe.transformer), type(pipe.transformer)
    dit_accel.enable(pipe, ras=ras)
    run(pipe, family)
    dit_accel.disable(pipe)
    assert type(pipe.transformer) is cls
    assert cls.__call__ is nn.Module.__call__
    after = state_of(pipe.transformer)
    assert before.keys() == after.keys()
    for name, old in before.items():
        assert old.keys() == after[name].keys()
        assert all(old[k] is after[name][k] or old[k] == after[name][k] for k in old)
    torch.testing.assert_close(run(pipe, family), plain, rtol=0, atol=0)


@every_family
def test_memory_returns_after_the_last_step(family):
    pipe = make(family)
    dit_accel.enable(pipe, ras={**FORECAST, "tail": 0})
    kept = []

    def look(pipe, step, timestep, kwargs):
        contexts = installation_of(pipe).clock.run.contexts.values()
        kept.append([x.states["ras"].outputs.nbytes for x in contexts if "ras" in x.states])
        return kwargs

    latents = run(pipe, family, callback_on_step_end=look)
    contexts, rows = (2, 1) if family in ("wan", "lumina2") else (1, 2)
    assert modes(pipe)[-1] == "forecast"  # tail=0: the run ends without the transformer
    channels = 2 if family == "lumina" else 1  # its output has the variance too
    assert kept[4] == [2 * rows * channels * latents.nbytes] * contexts
    assert kept[-1] == []


def test_the_class_passes_for_the_one_behind_it(tmp_path):
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    pipe = make("sd3")
    dit_accel.enable(pipe, ras="forecast")
    cls = type(pipe.transformer)
    assert cls is not SD3Transformer2DModel
    assert cls == SD3Transformer2DModel
    assert cls in (SD3Transformer2DModel,)
    assert (cls == nn.Module) is False
    assert len({cls, SD3Transformer2DModel}) == 1
    assert (cls.__name__, cls.__module__) == (
        SD3Transformer2DModel.__name__,
        SD3Transformer2DModel.__module__,
    )
    assert type(StableDiffusion3Pipeline.from_pipe(pipe).transformer) is cls
    pipe.transformer.save_pretrained(tmp_path)
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path)
    assert type(loaded) is SD3Transformer2DModel
    with pytest.raises(TypeError, match=r"disable\(\)"):
        pickle.dumps(pipe.transformer)


@every_family
@pytest.mark.parametrize("enable_first", [True, False], ids=["enable-offload", "offload-enable"])
@pytest.mark.combines("ras forecast", "model offload")
def test_offloading_moves_nothing_for_a_forecast(family, enable_first):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Moves(ModelHook):
        count = 0

        def pre_forward(self, module, *args, **kwargs):
            self.count += 1
            return args, kwargs

    pipe = make(family)
    dit_accel.enable(pipe, ras=FORECAST)
    expected = run(pipe, family)
    if not enable_first:
        dit_accel.disable(pipe)
    moves = Moves()
    add_hook_to_module(pipe.transformer, moves)
    if not enable_first:
        dit_accel.enable(pipe, ras=FORECAST)
    torch.testing.assert_close(run(pipe, family), expected, rtol=0, atol=0)
    contexts = 2 if family in ("wan", "lumina2") else 1
    assert moves.count == contexts * modes(pipe).count("dense")
    remove_hook_from_module(pipe.transformer)
    torch.testing.assert_close(run(pipe, family), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["wan", "sd3", "lumina2"])
@pytest.mark.combines("ras forecast", "image to image")
def test_image_to_image_plans_the_steps_that_really_run(family):
    """A run in a declared loop begins late."""
    pipe = make(family)
    dit_accel.enable(pipe, ras=FORECAST)
    pipe.scheduler.set_timesteps(16)
    pipe.scheduler.set_begin_index(6)
    full = pipe.scheduler.set_timesteps

    @functools.wraps(full)
    def late(*args, **kwargs):
        full(*args, **kwargs)
        pipe.scheduler.timesteps = pipe.scheduler.timesteps[6:]
        pipe.scheduler.sigmas = pipe.scheduler.sigmas[6:]

    pipe.scheduler.set_timesteps = late
    run(pipe, family, steps=16)
    assert len(modes(pipe)) == 10
    assert modes(pipe)[:2] == ["dense"] * 2
    assert modes(pipe).count("dense") == 6


def test_guidance_switched_off_in_mid_run():
    pipe = make("wan")
    dit_accel.enable(pipe, ras=FORECAST)

    def off(pipe, step, timestep, kwargs):
        if step == 4:
            pipe._guidance_scale = 0.0
        return kwargs

    assert torch.isfinite(run(pipe, "wan", callback_on_step_end=off)).all()
    assert modes(pipe).count("dense") == 6
    contexts = installation_of(pipe).clock.run.contexts.values()
    assert not any("ras" in x.states for x in contexts)


def test_a_call_that_was_never_seen_runs():
    """New text during a run begins a new context, which has no cached output."""
    pipe = make("sd3")
    dit_accel.enable(pipe, ras=FORECAST)
    planned = []

    def change(pipe, step, timestep, kwargs):
        tiles = method_of(pipe, "ras").plan.schedule.tiles
        planned[:] = [x == 0 for x in tiles]
        if step + 1 < len(tiles) and tiles[step + 1] == 0 and not change.done:
            change.done = True
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].clone()
        return kwargs

    change.done = False
    run(
        pipe,
        "sd3",
        callback_on_step_end=change,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    report = dit_accel.summary(pipe).ras
    first = planned.index(True)
    assert report.steps[first].mode == "dense"
    assert report.steps[first].dense_calls == {"first call of a context": 1}
    assert report.forecast_steps == sum(planned) - 1


def test_weights_that_change_in_mid_run_make_the_next_call_run():
    pipe = make("sd3")
    dit_accel.enable(pipe, ras=FORECAST)

    def change(pipe, step, timestep, kwargs):
        tiles = method_of(pipe, "ras").plan.schedule.tiles
        if step == tiles.index(0) - 1:
            with torch.no_grad():
                pipe.transformer.proj_out.weight.mul_(1.01)
        return kwargs

    run(pipe, "sd3", callback_on_step_end=change)
    first = method_of(pipe, "ras").plan.schedule.tiles.index(0)
    assert modes(pipe)[first] == "dense"
    assert "forecast" in modes(pipe)[first:]


def test_both_forms_of_return_value():
    """Sample in a declared loop, with and without `return_dict`."""
    pipe = make("wan")
    transformer = pipe.transformer
    dit_accel.enable(pipe, ras=FORECAST)
    text = torch.randn(1, 12, 24, generator=torch.Generator().manual_seed(0))
    results = []
    for return_dict in (True, False):
        pipe.scheduler.set_timesteps(10)
        latents = torch.randn(1, 4, 3, 14, 18, generator=torch.Generator().manual_seed(1))
        with torch.no_grad(), dit_accel.sampling_loop(pipe, pipe.scheduler):
            for t in pipe.scheduler.timesteps:
                out = transformer(latents, t.expand(1), text, return_dict=return_dict)
                velocity = out.sample if return_dict else out[0]
                latents = pipe.scheduler.step(velocity, t, latents, return_dict=False)[0]
        assert modes(pipe).count("forecast") == 4
        results.append(latents)
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_wrappers_are_answered_too():
    """PEFT and torch.compile call the transformer through its class."""
    from peft import LoraConfig, get_peft_model

    pipe = make("sd3")
    dit_accel.enable(pipe, ras=FORECAST)
    expected = run(pipe, "sd3")
    inner = pipe.transformer
    config = LoraConfig(r=2, target_modules=["to_k"])
    wrapped = get_peft_model(inner, config)
    wrapped.dtype, wrapped.device = inner.dtype, inner.device
    pipe.transformer = wrapped
    torch.testing.assert_close(run(pipe, "sd3"), expected, rtol=0, atol=1e-6)
    assert modes(pipe).count("forecast") == 4


def test_a_call_past_the_class_runs():
    """A call through `nn.Module._call_impl` cannot be answered: it runs dense and is counted."""
    pipe = make("wan")
    dit_accel.enable(pipe, ras=FORECAST)
    latents, text = torch.randn(1, 4, 3, 14, 18), torch.randn(1, 12, 24)
    pipe.scheduler.set_timesteps(10)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            velocity = nn.Module._call_impl(pipe.transformer, latents, t.expand(1), text)[0]
            latents = pipe.scheduler.step(velocity, t, latents, return_dict=False)[0]
    report = dit_accel.summary(pipe).ras
    assert report.dense_calls["the call could not be left out"] == 4
    assert set(modes(pipe)) == {"dense"}


@every_family
@pytest.mark.combines("sla and ras")
def test_sparse_attention_and_forecast_steps_together(family):
    pipe = make(family)
    sla = {"topk": 1.0, "block_q": 16, "block_k": 16, "crossover": "never", "dense_steps": 0}
    dit_accel.enable(pipe, ras=FORECAST)
    alone = run(pipe, family)
    dit_accel.enable(pipe, sla=sla)
    assert relative(run(pipe, family), alone) < 1e-5
    report = dit_accel.summary(pipe, strict=True)
    assert report.ras.forecast_steps == 4
    contexts = 2 if family in ("wan", "lumina2") else 1
    called = [x for x in report.layers if x.scheduled]
    assert all(x.sparse_calls == 6 * contexts for x in called)


@pytest.mark.parametrize("solver", ["ddim", "lcm"])
def test_schedulers_of_other_kinds(solver):
    from diffusers import DDIMScheduler, FlowMatchLCMScheduler

    pipe = make("sd3")
    pipe.scheduler = {"ddim": DDIMScheduler, "lcm": FlowMatchLCMScheduler}[solver]()
    dit_accel.enable(pipe, ras=FORECAST)
    if solver == "ddim":
        # No sigmas: levels come from alphas_cumprod.
        assert torch.isfinite(run(pipe, "sd3")).all()
        levels = method_of(pipe, "ras").plan.levels
        assert len(levels) == 11
        assert (levels[:-1] > levels[1:]).all()
        assert levels.min() >= 0
        assert levels.max() <= 1
        assert modes(pipe).count("forecast") == 4
    else:
        with pytest.warns(UserWarning, match=r"ras: .*noise"):
            run(pipe, "sd3")
        assert set(modes(pipe)) == {"dense"}
