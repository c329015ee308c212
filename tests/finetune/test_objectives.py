"""Losses against the same computed by hand, and draws that belong to a row alone."""

import math

import pytest
import torch

from dit_accel.finetune.objectives import Objective, row_generator
from dit_accel.finetune.parameters import prepare
from dit_accel.finetune.teacher import make_teacher

from ..random_pipelines import relative
from .cases import batch, calibrate, config, null_conditions, rows_of, sparse_attention
from .families.cases import FAMILIES, trainable


@pytest.fixture(scope="module")
def wan():
    """A tiny Wan with sparse attention; no test trains it."""
    prepared = trainable("wan")
    prepare(prepared.transformer, config(train="sla", sla={"combine": "alpha"}))
    calibrate(prepared.transformer)
    return prepared


def objective(prepared, family="wan", **changed):
    settings = config(**{"train": "sla", "targets": "conditional", **changed})
    return Objective(settings, prepared, make_teacher(prepared, settings), null_conditions(family))


def loss_of(made, given, *, step=3, first=0):
    return made(made.trainable.transformer, given, step=step, first=first)


def noisy_of(made, given, *, step=3, first=0):
    sigmas, noise, dropped = made.draw(given.latents, step, first)
    level = sigmas.view(-1, *[1] * (given.latents.ndim - 1))
    return (1 - level) * given.latents + level * noise, sigmas, noise, dropped


def mean_square(x):
    return x.square().flatten(1).mean(1)


def test_distillation_is_the_error_to_the_velocity_of_the_dense_model(wan):
    made, given = objective(wan), batch(wan, "wan")
    loss, logged = loss_of(made, given)
    noisy, sigmas, _, _ = noisy_of(made, given)
    plain = trainable("wan")  # the same weights, dense
    with torch.no_grad():
        target = plain.velocity(plain.transformer, noisy, sigmas, given.conditions)
        student = wan.velocity(wan.transformer, noisy, sigmas, given.conditions)
    error = mean_square(student - target)
    assert float(error.min()) > 0
    torch.testing.assert_close(loss, error.mean())
    torch.testing.assert_close(logged["distillation"], error.mean())
    torch.testing.assert_close(logged["relative_error"], (error / mean_square(target)).mean())
    torch.testing.assert_close(logged["sigma"], sigmas.mean())
    assert not any(x.requires_grad for x in logged.values())
    assert loss.requires_grad


def test_diffusion_is_the_error_to_noise_minus_latents(wan):
    made, given = objective(wan, loss="diffusion"), batch(wan, "wan")
    loss, logged = loss_of(made, given)
    noisy, sigmas, noise, _ = noisy_of(made, given)
    with torch.no_grad():
        student = wan.velocity(wan.transformer, noisy, sigmas, given.conditions)
    torch.testing.assert_close(loss, (student - (noise - given.latents)).square().mean())
    assert set(logged) == {"loss", "diffusion", "sigma"}


def test_mix_weighs_both(wan):
    given = batch(wan, "wan")
    parts = [loss_of(objective(wan, loss=x), given)[0] for x in ("distillation", "diffusion")]
    for weight, share in ((None, 0.5), (0.2, 0.2)):
        loss, logged = loss_of(objective(wan, loss="mix", diffusion_weight=weight), given)
        torch.testing.assert_close(loss, (1 - share) * parts[0] + share * parts[1])
        torch.testing.assert_close(logged["distillation"], parts[0].detach())
        torch.testing.assert_close(logged["diffusion"], parts[1].detach())


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap"])
def test_weights_are_those_of_diffusers_on_each_row(wan, scheme):
    given = batch(wan, "wan")
    made = objective(wan, loss="diffusion", weighting_scheme=scheme)
    noisy, sigmas, noise, _ = noisy_of(made, given)
    with torch.no_grad():
        student = wan.velocity(wan.transformer, noisy, sigmas, given.conditions)
    error = mean_square(student - (noise - given.latents))
    weight = sigmas**-2
    if scheme == "cosmap":
        weight = 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    torch.testing.assert_close(loss_of(made, given)[0].detach(), (weight * error).mean())


def test_a_row_is_the_same_in_every_split_of_the_batch(wan):
    made = objective(wan, targets="mixed", caption_dropout=0.5)
    given = batch(wan, "wan", rows=4)
    whole = [x for x in made.draw(given.latents, 7, 0)]
    for start, stop in ((0, 1), (1, 4), (3, 4)):
        part = rows_of(given, start, stop)
        for a, b in zip(made.draw(part.latents, 7, start), whole, strict=True):
            assert torch.equal(a, b[start:stop])
    together = loss_of(made, given, step=7)[0]
    halves = [loss_of(made, rows_of(given, i, i + 2), step=7, first=i)[0] for i in (0, 2)]
    torch.testing.assert_close(sum(halves) / 2, together)
    # Another process drew in between, or this run was resumed.
    torch.rand(100)
    assert torch.equal(made.draw(given.latents, 7, 0)[1], whole[1])


def test_steps_rows_and_seeds_draw_differently(wan):
    given = batch(wan, "wan", rows=2)
    draws = [
        objective(wan, seed=seed).draw(given.latents, step, first)[1][0]
        for seed, step, first in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    for i, a in enumerate(draws):
        for b in draws[i + 1 :]:
            assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.1
    first, second = (row_generator(0, 0, i).initial_seed() for i in (0, 1))
    assert first != second


def levels(made, count=400):
    return torch.cat([made._sigma(row_generator(0, 0, i)) for i in range(count)])


def test_uniform_levels_are_shifted_as_the_scheduler_shifts_them(wan):
    plain = levels(objective(wan, flow_shift=1.0))
    assert 0.001 <= plain.min() < 0.02
    assert 0.98 < plain.max() <= 1
    assert abs(float(plain.mean()) - 0.5) < 0.05
    shifted = levels(objective(wan))  # 3, that of the model
    torch.testing.assert_close(shifted, (3 * plain / (1 + 2 * plain)))
    torch.testing.assert_close(levels(objective(wan, weighting_scheme="uniform")), shifted)


def test_logit_normal_and_mode_levels(wan):
    def mean(**changed):
        return float(levels(objective(wan, flow_shift=1.0, **changed)).mean())

    def spread(**changed):
        return float(levels(objective(wan, flow_shift=1.0, **changed)).std())

    scheme = {"weighting_scheme": "logit_normal"}
    assert mean(**scheme, logit_mean=1.5) > 0.7 > 0.6 > mean(**scheme) > 0.4
    assert mean(**scheme, logit_mean=-1.5) < 0.3
    assert spread(**scheme, logit_std=0.1) < 0.05 < spread(**scheme)
    assert spread(weighting_scheme="mode", mode_scale=1.29) < spread()


def test_mixed_targets_replace_captions_for_student_and_teacher(wan):
    made = objective(wan, targets="mixed", caption_dropout=0.5)
    given = batch(wan, "wan", rows=4)
    step = next(s for s in range(50) if 0 < int(made.draw(given.latents, s, 0)[2].sum()) < 4)
    loss, _ = loss_of(made, given, step=step)
    noisy, sigmas, _, dropped = noisy_of(made, given, step=step)
    null = null_conditions("wan")["encoder_hidden_states"]
    text = given.conditions["encoder_hidden_states"].clone()
    text[dropped] = null
    with torch.no_grad():
        replaced = {"encoder_hidden_states": text}
        student = wan.velocity(wan.transformer, noisy, sigmas, replaced)
        plain = trainable("wan")
        target = plain.velocity(plain.transformer, noisy, sigmas, replaced)
    torch.testing.assert_close(loss.detach(), (student - target).square().mean())


def test_the_share_of_replaced_captions(wan):
    latents = torch.zeros(300, 1)

    def share(**changed):
        return float(objective(wan, **changed).draw(latents, 0, 0)[2].float().mean())

    assert 0.05 < share(targets="mixed") < 0.16  # a tenth
    assert 0.7 < share(targets="mixed", caption_dropout=0.8) < 0.9
    assert share(targets="conditional") == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_guided_targets_are_what_the_pipeline_samples_with(family):
    prepared = trainable(family)
    prepare(prepared.transformer, config(train="sla", sla={"combine": "proj"}))
    made = objective(prepared, family, targets="guided", guidance_scale=4.0)
    given = batch(prepared, family)
    loss, _ = loss_of(made, given)
    noisy, sigmas, _, _ = noisy_of(made, given)
    plain = trainable(family)
    null = {name: x.repeat_interleave(2, 0) for name, x in null_conditions(family).items()}
    with torch.no_grad():
        student = prepared.velocity(prepared.transformer, noisy, sigmas, given.conditions)
        conditional, unconditional = (
            plain.velocity(plain.transformer, noisy, sigmas, x) for x in (given.conditions, null)
        )
        target = plain.guide(conditional, unconditional, 4.0)
    assert relative(target, conditional) > 1e-3
    torch.testing.assert_close(loss.detach(), mean_square(student - target).mean())
    # A student that reads everything has no error.
    sparse_attention(prepared.transformer).set_topk(1.0)
    _, logged = loss_of(objective(prepared, family), given)
    assert float(logged["relative_error"]) < 1e-9


def test_what_does_not_fit_is_refused(wan):
    settings = config(train="sla")
    with pytest.raises(ValueError, match=r"^teacher=None: loss='distillation'"):
        Objective(settings, wan, None, null_conditions("wan"))
    null = {"encoder_hidden_states": torch.zeros(1, 7, 24)}
    teacher = make_teacher(wan, settings)
    made = Objective(config(train="sla", targets="mixed"), wan, teacher, null)
    with pytest.raises(ValueError, match=r"^null_conditions: .*max_sequence_length"):
        loss_of(made, batch(wan, "wan"))
    # Without a caption to replace, they are not needed.
    Objective(config(train="sla", targets="conditional"), wan, teacher, {})(
        wan.transformer, batch(wan, "wan"), step=0, first=0
    )


def test_training_on_the_loss_lowers_it():
    prepared = trainable("wan")
    settings = config(sla={"combine": "alpha"}, targets="conditional", learning_rate=3e-3)
    trained = prepare(prepared.transformer, settings)
    made = Objective(settings, prepared, make_teacher(prepared, settings), {})
    given = batch(prepared, "wan")
    optimizer = torch.optim.AdamW(trained.groups)
    errors = []
    for step in range(8):
        loss, logged = made(prepared.transformer, given, step=step % 2, first=0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(float(logged["relative_error"]))
    assert sum(errors[-2:]) < 0.8 * sum(errors[:2])
