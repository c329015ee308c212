"""Forecast steps, which use only the inputs and the output of a transformer."""

import pytest
import torch
from torch import nn

import dit_accel
from dit_accel.runtime.install import installation_of, method_of

from ..random_pipelines import make, more, relative, run, state_of
from .definition import Definition

every_model = pytest.mark.parametrize(
    "family", ["flux", "qwenimage", "hunyuan_video", "ltx", "cogvideox"]
)


@every_model
def test_forecast_steps_equal_the_definition(family):
    pipe = make(family)
    plain = run(pipe, family, steps=16)
    before = state_of(pipe.transformer)
    dit_accel.enable(pipe, ras="forecast")
    calls = []
    hook = (
        more(family).blocks(pipe.transformer)[0].register_forward_hook(lambda *_: calls.append(1))
    )
    latents = run(pipe, family, steps=16)
    hook.remove()
    report = dit_accel.summary(pipe, strict=True).ras
    modes, levels = [x.mode for x in report.steps], method_of(pipe, "ras").plan.levels.tolist()
    assert modes.count("dense") == report.cost == 10  # .65 of 16
    assert len(calls) % 10 == 0
    dit_accel.disable(pipe)
    after = state_of(pipe.transformer)
    assert before.keys() == after.keys()
    assert all(old.keys() == after[name].keys() for name, old in before.items())
    torch.testing.assert_close(run(pipe, family, steps=16), plain, rtol=0, atol=0)
    Definition(pipe.transformer, modes, levels)
    assert relative(run(pipe, family, steps=16), latents) < 2e-5
    assert 0 < relative(latents, plain) < 0.3


@every_model
def test_the_whole_budget_changes_nothing(family):
    pipe = make(family)
    plain = run(pipe, family, steps=4)
    dit_accel.enable(pipe, ras={"budget": 1.0})
    with pytest.warns(UserWarning, match=r"ras: .*dense"):
        torch.testing.assert_close(run(pipe, family, steps=4), plain, rtol=0, atol=0)


def test_partial_steps_and_sparse_attention_without_a_family_file_are_refused_by_name():
    from diffusers import AllegroTransformer3DModel

    transformer = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        cross_attention_dim=24,
        caption_channels=16,
        sample_width=4,
        sample_height=4,
        sample_frames=2,
    )
    for on in ({"ras": {"ratio": 0.5}}, {"sla": "balanced"}):
        with pytest.raises(ValueError, match=r"AllegroTransformer3DModel.*WanTransformer3DModel"):
            dit_accel.enable(transformer, **on)
    assert installation_of(transformer) is None


def test_two_transformers_share_the_steps():
    """Wan2.2: the first transformer runs while the timestep is above the boundary."""
    pipe = make("wan22", "unipc")
    plain = run(pipe, "wan22", steps=10)
    first = int((pipe.scheduler.timesteps >= 800).sum())
    dit_accel.enable(pipe, ras="forecast")
    calls = [0, 0]

    def count(i):
        def hook(*_):
            calls[i] += 1

        return hook

    for i, transformer in enumerate((pipe.transformer, pipe.transformer_2)):
        more("wan22").blocks(transformer)[0].register_forward_hook(count(i))
    latents = run(pipe, "wan22", steps=10)
    report = dit_accel.summary(pipe)
    assert list(report.parts) == ["transformer", "transformer_2"]
    high, low = (x.ras for x in report.parts.values())
    assert [x.step for x in report.ras.steps] == list(range(20))
    assert report.ras.cost == high.cost + low.cost
    assert len(high.steps) == first
    assert len(low.steps) == 20 - first
    for one, ran in ((high, calls[0]), (low, calls[1])):
        assert one.forecast_steps > 0
        assert ran == 2 * (len(one.steps) - one.forecast_steps)  # guidance: two calls
        assert one.cost == len(one.steps) - one.forecast_steps
        assert [x.step for x in one.steps] == list(range(len(one.steps)))
        assert [x.mode for x in one.steps[:3]] == ["dense"] * 3
    assert 0 < relative(latents, plain) < 0.3
    contexts = installation_of(pipe).clock.run.contexts.values()
    assert not any("ras" in x.states for x in contexts)  # freed at the boundary
    dit_accel.disable(pipe)
    assert type(pipe.transformer_2).__call__ is nn.Module.__call__
    torch.testing.assert_close(run(pipe, "wan22", steps=10), plain, rtol=0, atol=0)


@pytest.mark.parametrize("before", [None, 0.5])
def test_two_transformers_are_enabled_both_or_not_at_all(before):
    from diffusers import FirstBlockCacheConfig

    pipe = make("wan22")
    if before is not None:
        dit_accel.enable(pipe, ras={"budget": before})
    pipe.transformer_2.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"ras: .*step cache"):
        dit_accel.enable(pipe, ras={"budget": 0.7})
    on = method_of(pipe.transformer, "ras")
    assert (None if on is None else on.config.budget) == before


def test_a_transformer_without_hidden_states_is_refused():
    class Own(nn.Module):
        def forward(self, x, timestep):
            return x

    with pytest.raises(ValueError, match=r"target: .*Own.*hidden_states"):
        dit_accel.enable(Own(), ras="forecast")


def test_an_own_transformer_in_an_own_loop():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.calls = 0

        def forward(self, hidden_states, timestep):
            self.calls += 1
            return self.layer(hidden_states)

    transformer = Own()
    dit_accel.enable(transformer, ras={"budget": 0.5})
    sigmas = torch.linspace(1, 0, 21)
    timesteps = 1000 * sigmas[:-1]
    latents = torch.randn(2, 6, 4)
    with torch.no_grad(), dit_accel.sampling_loop(transformer, timesteps=timesteps, sigmas=sigmas):
        for i, t in enumerate(timesteps):
            latents = latents + (sigmas[i + 1] - sigmas[i]) * transformer(latents, t)
    assert transformer.calls == 10
    assert dit_accel.summary(transformer).ras.forecast_steps == 10


def test_more_than_one_tensor_runs_dense_and_says_so():
    class Two(nn.Module):
        def forward(self, hidden_states, timestep):
            return hidden_states, hidden_states.mean()

    transformer = Two()
    dit_accel.enable(transformer, ras={"budget": 0.5})
    sigmas = torch.linspace(1, 0, 13)
    timesteps = sigmas[:-1].clone()
    latents = torch.randn(1, 4)

    def loop():
        with dit_accel.sampling_loop(transformer, timesteps=timesteps, sigmas=sigmas):
            for t in timesteps:
                transformer(latents, t)

    with pytest.warns(UserWarning, match="tensor"), torch.no_grad():
        loop()
    assert dit_accel.summary(transformer).ras.cost == 12
