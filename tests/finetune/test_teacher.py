"""The teacher answers as the dense model did before training, whatever has been trained since."""

import pytest
import torch

import dit_accel
from dit_accel.finetune.objectives import Objective
from dit_accel.finetune.parameters import prepare
from dit_accel.finetune.teacher import adapters_off, cast_weights, dense, make_teacher

from ..random_pipelines import relative
from .cases import batch, calibrate, config, copies, equal, null_conditions
from .families.cases import FAMILIES, pipeline, trainable

CASES = [
    (family, train)
    for family in FAMILIES
    for train in ("all", "lora", "sla")
    if (family, train) != ("lumina", "lora")
]


def train(prepared, settings, trained, family, steps=2):
    teacher = make_teacher(prepared, settings)
    made = Objective(settings, prepared, teacher, null_conditions(family))
    optimizer = torch.optim.AdamW(trained.groups)
    for step in range(steps):
        made(prepared.transformer, batch(prepared, family), step=step, first=0)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return teacher


@pytest.mark.parametrize(("family", "what"), CASES)
def test_the_teacher_stays_the_dense_model(family, what):
    plain, prepared = trainable(family), trainable(family)
    settings = config(train=what, sla={"combine": "proj"}, learning_rate=1e-2)
    trained = prepare(prepared.transformer, settings)
    before = copies(trained.named)
    teacher = train(prepared, settings, trained, family)
    assert not equal(copies(trained.named), before)
    given, level = batch(prepared, family), torch.tensor([0.3, 0.9])
    expected = plain.velocity(plain.transformer, given.latents, level, given.conditions).detach()
    found = teacher.velocity(prepared, given.latents, level, given.conditions)
    if what == "all":
        assert torch.equal(found, expected)
    assert relative(found, expected) < 1e-6  # paused attention may keep its order of tokens
    assert not found.requires_grad
    student = prepared.velocity(prepared.transformer, given.latents, level, given.conditions)
    assert student.requires_grad
    assert relative(student.detach(), expected) > 1e-4
    assert (teacher.model is None) == (what != "all")


@pytest.mark.parametrize("what", ["lora", "sla"])
def test_a_shared_transformer_is_as_before_after_each_answer(what):
    prepared = trainable("wan")
    settings = config(train=what, sla={"combine": "alpha"}, rank=4)
    trained = prepare(prepared.transformer, settings)
    calibrate(prepared.transformer)
    # A weight that was frozen by hand stays so, which PEFT's own switch forgets.
    held = next(iter(trained.named.values())).requires_grad_(False)
    flags = {name: x.requires_grad for name, x in prepared.transformer.named_parameters()}
    given, level = batch(prepared, "wan"), torch.tensor([0.3, 0.9])
    student = prepared.velocity(prepared.transformer, given.latents, level, given.conditions)
    make_teacher(prepared, settings).velocity(prepared, given.latents, level, given.conditions)
    again = prepared.velocity(prepared.transformer, given.latents, level, given.conditions)
    assert torch.equal(student, again)
    now = {name: x.requires_grad for name, x in prepared.transformer.named_parameters()}
    assert now == flags
    assert not held.requires_grad


def test_answers_of_the_teacher_are_counted_as_paused():
    prepared = trainable("wan")
    settings = config(train="sla", sla={"combine": "alpha"})
    prepare(prepared.transformer, settings)
    given, level = batch(prepared, "wan"), torch.tensor([0.3, 0.9])
    teacher = make_teacher(prepared, settings)
    for _ in range(2):
        teacher.velocity(prepared, given.latents, level, given.conditions)
    prepared.velocity(prepared.transformer, given.latents, level, given.conditions)
    for layer in dit_accel.summary(prepared.transformer).layers:
        assert layer.dense_calls == {"paused": 2}
        assert layer.sparse_calls == 1


def test_both_switches_come_back_after_an_error():
    prepared = trainable("wan")
    prepare(prepared.transformer, config(train="lora"))

    def fail():
        with dense(prepared.transformer):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not prepared.transformer.blocks[0].attn1.to_q.disable_adapters
    given, level = batch(prepared, "wan"), torch.tensor([0.3, 0.9])
    prepared.velocity(prepared.transformer, given.latents, level, given.conditions)
    assert not dit_accel.summary(prepared.transformer, strict=True).dense_calls
    plain = trainable("wan").transformer
    with dense(plain), adapters_off(plain):  # nothing is on
        pass


def test_a_copy_is_dense_frozen_and_in_the_dtype_of_the_computation():
    prepared = trainable("wan")
    settings = config(train="all", mixed_precision="bf16")
    prepare(prepared.transformer, settings)
    model = make_teacher(prepared, settings).model
    assert not dit_accel.summary(model).enabled
    assert dit_accel.summary(prepared.transformer).enabled
    assert not any(x.requires_grad for x in model.parameters())
    assert not model.training
    dtypes = {name: x.dtype for name, x in model.named_parameters()}
    assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    # diffusers keeps these in fp32 when it loads the model in bf16, too.
    assert dtypes["scale_shift_table"] == dtypes["blocks.0.norm2.weight"] == torch.float32
    assert model.rope.freqs_cos.dtype == prepared.transformer.rope.freqs_cos.dtype
    given, level = batch(prepared, "wan"), torch.tensor([0.3, 0.9])
    plain = trainable("wan")
    exact = plain.velocity(plain.transformer, given.latents, level, given.conditions).detach()
    teacher = make_teacher(prepared, settings)
    assert (
        relative(teacher.velocity(prepared, given.latents, level, given.conditions), exact) < 0.05
    )


def test_casting_is_that_of_loading_in_this_dtype(tmp_path):
    from diffusers import SD3Transformer2DModel, WanTransformer3DModel

    for family, cls in (("wan", WanTransformer3DModel), ("sd3", SD3Transformer2DModel)):
        model = pipeline(family).transformer
        model.save_pretrained(tmp_path / family)
        loaded = cls.from_pretrained(tmp_path / family, dtype=torch.bfloat16)
        cast_weights(model, torch.bfloat16)
        found = {name: x.dtype for name, x in model.state_dict().items()}
        assert found == {name: x.dtype for name, x in loaded.state_dict().items()}
        assert torch.bfloat16 in found.values()
