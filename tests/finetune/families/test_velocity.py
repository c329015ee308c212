"""Velocities agree with what each pipeline's own loop does with its scheduler and transformer."""

import itertools

import pytest
import torch

import dit_accel
from dit_accel.finetune.families import trainable_of
from dit_accel.runtime.install import method_of

from ...random_pipelines import relative, run
from .cases import FAMILIES, TEXT_TOKENS, conditions, latents, pipeline, trainable

NEGATIVE = -3
"""The prompt that `random_pipelines.run` guides away from."""


def sampled(pipe, family, guidance):
    """Latents before each step and after the last one, of two prompts whose texts differ in length."""
    prepared = trainable_of(pipe)
    shape = prepared.latent_shape(112, 144, 9 if family == "wan" else 1)
    seen = [torch.randn(2, *shape, generator=torch.Generator().manual_seed(4))]

    def note(_pipe, _step, _t, given):
        seen.append(given["latents"])
        return given

    run(
        pipe,
        family,
        prompts=(0, 4),
        height=112,
        width=144,
        steps=3,
        guidance=guidance,
        latents=seen[0],
        callback_on_step_end=note,
    )
    return seen


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_euler_steps_with_our_velocity_are_those_of_the_pipeline(family, guidance):
    pipe = pipeline(family)
    seen = sampled(pipe, family, guidance)
    prepared = trainable_of(pipe, max_sequence_length=TEXT_TOKENS)
    sigmas = pipe.scheduler.sigmas
    given, negative = conditions(family, (0, 4)), conditions(family, (NEGATIVE, NEGATIVE))
    for i, (before, after) in enumerate(itertools.pairwise(seen)):
        level = sigmas[i].expand(2)
        with torch.no_grad():
            velocity = prepared.velocity(pipe.transformer, before, level, given)
            if guidance > 1:
                other = prepared.velocity(pipe.transformer, before, level, negative)
                velocity = prepared.guide(velocity, other, guidance)
        assert relative(before + (sigmas[i + 1] - sigmas[i]) * velocity, after) < 2e-6
        # The step itself is what agrees, not latents that hardly move.
        assert relative((sigmas[i + 1] - sigmas[i]) * velocity, after - before) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_of_different_lengths_run_sparse(family):
    prepared = trainable(family)
    transformer = prepared.transformer
    sla = {"block_q": 16, "block_k": 16, "crossover": "never", "dense_layers": 0}
    dit_accel.enable(transformer, sla=sla)
    noisy = latents(prepared)
    prepared.velocity(transformer, noisy, torch.tensor([0.3, 0.8]), conditions(family, (0, 4)))
    assert not dit_accel.summary(transformer, strict=True).dense_calls
    assert len(method_of(transformer, "sla").layers) >= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_do_not_mix(family):
    prepared = trainable(family)
    noisy, level = latents(prepared, rows=3), torch.tensor([0.2, 0.9, 0.5])
    given = conditions(family, (0, 4, 2))
    with torch.no_grad():
        together = prepared.velocity(prepared.transformer, noisy, level, given)
        for i in range(3):
            row = {name: x[i : i + 1] for name, x in given.items()}
            alone = prepared.velocity(prepared.transformer, noisy[i : i + 1], level[i : i + 1], row)
            assert relative(alone, together[i : i + 1]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_models_get_their_dtype_and_answer_in_fp32(family):
    prepared = trainable(family)
    noisy, level = latents(prepared), torch.tensor([0.3, 0.8])
    given = conditions(family, (0, 4))
    with torch.no_grad():
        exact = prepared.velocity(prepared.transformer, noisy, level, given)
        prepared.transformer.to(torch.bfloat16)
        half = prepared.velocity(prepared.transformer, noisy, level, given)
    assert half.dtype == exact.dtype == torch.float32
    assert relative(half, exact) < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_example_conditions_have_the_shapes_of_real_ones(family):
    prepared = trainable(family)
    found, real = prepared.example_conditions(2), conditions(family, (0, 1))
    assert found.keys() == real.keys()
    for name, x in found.items():
        shape = list(real[name].shape)
        if family.startswith("sd3") and name == "encoder_hidden_states":
            shape[1] = 77 + TEXT_TOKENS
        if family == "lumina":  # padded to a multiple of 8
            shape[1] = 16
        assert list(x.shape) == shape
