"""Caches of a run are dropped if weights change during the run, and only then."""

import contextlib
import functools

import pytest
import torch

import dit_accel
from dit_accel.runtime.install import installation_of

from .. import random_pipelines
from ..random_pipelines import make, relative, scheduler
from .own_loops import BOTH, RAS, Conditions

run = functools.partial(random_pipelines.run, steps=8)
ALL_TOKENS = {**RAS, "ratio": 1.0}
CHANGE_AFTER = 3
FRESH = "first call of a context"


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def add_adapter(transformer, name="one", seed=0, alpha=2):
    from peft import LoraConfig

    torch.manual_seed(seed)
    config = LoraConfig(
        r=2, lora_alpha=alpha, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False
    )
    transformer.add_adapter(config, adapter_name=name)
    return transformer


def two_adapters(transformer):
    add_adapter(add_adapter(transformer), "two", seed=1)
    transformer.set_adapter("one")


def fused(transformer):
    add_adapter(transformer)
    transformer.fuse_lora()


def disabled(transformer):
    add_adapter(transformer)
    transformer.disable_lora()


def scale_of_one_layer(transformer):
    layer = next(x for x in transformer.modules() if hasattr(x, "lora_A"))
    layer.set_scale("one", 0.3)


def other_state(transformer):
    state = transformer.state_dict()
    return {
        name: x * 1.3 if "to_" in name and x.is_floating_point() else x for name, x in state.items()
    }


def load(transformer):
    transformer.load_state_dict(other_state(transformer))


def assign(transformer):
    transformer.load_state_dict(other_state(transformer), assign=True)


def new_parameters(transformer):
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(module.weight.detach() * 1.3)


def optimizer_step(transformer):
    for parameter in transformer.parameters():
        parameter.grad = torch.full_like(parameter, 0.05)
    torch.optim.SGD(transformer.parameters(), lr=1.0).step()


def plain_of(transformer):
    """Return another transformer with the same config."""
    return type(transformer).from_config(transformer.config)


def nothing(transformer):
    pass


CHANGES = {
    "add": (nothing, add_adapter),
    "switch": (two_adapters, lambda t: t.set_adapter("two")),
    "several": (two_adapters, lambda t: t.set_adapters(["one", "two"], [0.5, 0.7])),
    "scale": (add_adapter, lambda t: t.set_adapters("one", 0.4)),
    "scale of one layer": (add_adapter, scale_of_one_layer),
    "disable": (add_adapter, lambda t: t.disable_lora()),
    "enable": (disabled, lambda t: t.enable_lora()),
    "delete": (two_adapters, lambda t: t.delete_adapters("one")),
    "fuse with scale": (add_adapter, lambda t: t.fuse_lora(lora_scale=0.3)),
    "unload": (add_adapter, lambda t: t.unload_lora()),
    "load": (nothing, load),
    "assign": (assign, assign),
    "new parameters": (new_parameters, new_parameters),
    "optimizer": (nothing, optimizer_step),
}
SAME_WEIGHTS = {
    "fuse": (add_adapter, lambda t: t.fuse_lora()),
    "unfuse": (fused, lambda t: t.unfuse_lora()),
}


def changing(change, clone=False):
    """Return arguments of a pipeline call that changes weights after a step; with `clone`, its embeddings change too."""

    def callback(pipe, step, timestep, kwargs):
        if step == CHANGE_AFTER:
            change(pipe.transformer)
            if clone:
                return {name: x.clone() for name, x in kwargs.items()}
        return kwargs

    inputs = ["prompt_embeds", "negative_prompt_embeds"]
    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": inputs}


def wan(prepare):
    pipe = make("wan")
    prepare(pipe.transformer)
    return pipe


@pytest.mark.parametrize("what", [*CHANGES, *SAME_WEIGHTS])
def test_a_change_in_mid_run_drops_what_was_kept(what):
    prepare, change = {**CHANGES, **SAME_WEIGHTS}[what]
    plain = run(wan(prepare), "wan", **changing(change))
    if what in CHANGES:
        assert relative(run(wan(prepare), "wan"), plain) > 1e-4
    pipe = wan(prepare)
    dit_accel.enable(pipe, ras=ALL_TOKENS)
    assert relative(run(pipe, "wan", **changing(change)), plain) < 1e-5
    found = []
    for clone in (False, True):  # with new embeddings nothing that was kept can be used
        pipe = wan(prepare)
        dit_accel.enable(pipe, **BOTH)
        latents = run(pipe, "wan", **changing(change, clone))
        steps = dit_accel.summary(pipe).ras.steps
        assert steps[CHANGE_AFTER + 1].dense_calls == {FRESH: 2}
        assert not steps[CHANGE_AFTER].dense_calls
        assert not steps[CHANGE_AFTER + 2].dense_calls
        found.append(latents)
    same(*found)


@pytest.mark.parametrize(
    ("family", "what"),
    [
        ("sd3", "scale"),
        ("sd3", "load"),
        ("sd35", "add"),
        ("lumina", "load"),  # diffusers has no adapters for it
        ("lumina2", "fuse with scale"),
        ("lumina2", "load"),
    ],
)
def test_every_family_notices(family, what):
    prepare, change = CHANGES[what]

    def made():
        pipe = make(family)
        prepare(pipe.transformer)
        return pipe

    def callback(pipe, step, timestep, kwargs):
        if step == CHANGE_AFTER:
            change(pipe.transformer)
        return kwargs

    plain = run(made(), family, callback_on_step_end=callback)
    pipe = made()
    dit_accel.enable(pipe, ras=ALL_TOKENS)
    assert relative(run(pipe, family, callback_on_step_end=callback), plain) < 1e-5
    pipe = made()
    dit_accel.enable(pipe, **BOTH)
    run(pipe, family, callback_on_step_end=callback)
    steps = dit_accel.summary(pipe).ras.steps
    calls = 2 if family == "lumina2" else 1
    assert steps[CHANGE_AFTER + 1].dense_calls == {FRESH: calls}
    assert dit_accel.summary(pipe).ras.ras_steps == 4


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("wan", "attention_kwargs"),
        ("sd3", "joint_attention_kwargs"),
        ("lumina2", "attention_kwargs"),
    ],
)
def test_a_lora_scale_among_the_arguments_that_changes_in_mid_run(family, name):
    def made():
        pipe = make(family)
        add_adapter(pipe.transformer)
        return pipe

    def changed(scales=(1.0, 0.2)):
        own = {"scale": scales[0]}

        def callback(pipe, step, timestep, kwargs):
            if step == CHANGE_AFTER:
                own["scale"] = scales[1]
            return kwargs

        return {name: own, "callback_on_step_end": callback}

    plain = run(made(), family, **changed())
    assert relative(run(made(), family), plain) > 1e-4
    pipe = made()
    dit_accel.enable(pipe, ras=ALL_TOKENS)
    assert relative(run(pipe, family, **changed()), plain) < 1e-5
    dit_accel.enable(pipe, ras=RAS)
    run(pipe, family, **changed())
    calls = 1 if family == "sd3" else 2
    assert dit_accel.summary(pipe).ras.steps[CHANGE_AFTER + 1].dense_calls == {FRESH: calls}


@pytest.mark.parametrize(("scale", "alpha"), [(1.0, 2), (0.7, 2), (0.1, 3), (0.9, 1), (0.0, 2)])
def test_a_constant_lora_scale_among_the_arguments_keeps_the_steps(scale, alpha):
    pipe = make("sd3")
    add_adapter(pipe.transformer, alpha=alpha)
    pipe.transformer.set_adapters("one", 0.7)
    dit_accel.enable(pipe, ras=RAS)
    run(pipe, "sd3", joint_attention_kwargs={"scale": scale})
    assert dit_accel.summary(pipe).ras.ras_steps == 5
    assert FRESH not in dit_accel.summary(pipe).ras.dense_calls


# Runs side by side ----------------------------------------------------------------------------------


@torch.no_grad()
def alternating(transformer, before_each=(nothing, nothing), change=nothing):
    """Return the outputs of two loops that alternate step by step."""
    loops = []
    for prompt, steps in enumerate((10, 8)):
        made = scheduler("euler")
        made.set_timesteps(steps)
        loops.append((made, Conditions("wan", prompt), []))
    with contextlib.ExitStack() as stack:
        for made, *_ in loops:
            stack.enter_context(dit_accel.sampling_loop(transformer, made))
        for i in range(10):
            for which, (made, conditions, out) in enumerate(loops):
                if i >= len(made.timesteps):
                    continue
                before_each[which](transformer)
                if (i, which) == (5, 1):
                    change(transformer)
                latents = conditions.latents * (1 - i / 10)
                out.append(conditions.velocity(transformer, latents, made.timesteps[i].expand(1)))
    return [out for *_, out in loops]


def test_a_change_between_the_calls_of_two_runs_reaches_both():
    def change(transformer):
        transformer.set_adapters("one", 0.2)

    pipe = wan(add_adapter)
    plain = alternating(pipe.transformer, change=change)
    pipe = wan(add_adapter)
    dit_accel.enable(pipe, ras={**RAS, "correction": 0})
    found = alternating(pipe.transformer, change=change)
    equal = [
        [torch.equal(a, b) for a, b in zip(x, y, strict=True)]
        for x, y in zip(found, plain, strict=True)
    ]
    first = [True] * 2 + [False] * 4 + [True] + [False] * 2 + [True]
    second = [True] * 2 + [False] * 3 + [True] + [False] + [True]
    assert equal == [first, second]


def test_runs_with_adapters_of_their_own_keep_their_steps():
    own = [lambda t: t.set_adapters("one", 1.0), lambda t: t.set_adapters("two", 1.0)]
    pipe = wan(two_adapters)
    dit_accel.enable(pipe, ras=RAS)
    expected = []
    for which in (0, 1):
        expected.append(alternating(pipe.transformer, (own[which], own[which]))[which])
    found = alternating(pipe.transformer, own)
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            same(x, y)


# Weights that only move -----------------------------------------------------------------------------


def model_offload(pipe):
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(pipe.transformer, execution_device="cpu")


def sequential_offload(pipe):
    from accelerate import cpu_offload

    for module in (pipe.transformer, pipe.vae):
        cpu_offload(module, execution_device=torch.device("cpu"))


def group_offload(kind):
    def put_on(pipe):
        cpu = torch.device("cpu")
        pipe.transformer.enable_group_offload(
            onload_device=cpu, offload_device=cpu, offload_type=kind, num_blocks_per_group=1
        )

    return put_on


def layerwise_casting(pipe):
    pipe.transformer.enable_layerwise_casting(torch.bfloat16, torch.float32)


MOVES = {
    "none": lambda pipe: None,
    "model": model_offload,
    "sequential": sequential_offload,
    "block_level": group_offload("block_level"),
    "leaf_level": group_offload("leaf_level"),
    "casting": layerwise_casting,
}


@pytest.mark.parametrize(
    ("family", "lora", "move"),
    [
        *(("wan", True, move) for move in MOVES),
        *(("sd3", False, "block_level"), ("sd3", False, "casting"), ("wan", False, "sequential")),
        ("lumina2", True, "leaf_level"),
    ],
)
@pytest.mark.combines("sla and ras", "LoRA", "model offload", "group offload", "layerwise casting")
def test_weights_that_only_move_keep_the_steps(family, move, lora):
    pipe = make(family)
    if lora:
        add_adapter(pipe.transformer)
    MOVES[move](pipe)
    dit_accel.enable(pipe, **BOTH)
    for _ in range(2 if move != "none" else 1):
        run(pipe, family)
        report = dit_accel.summary(pipe, strict=True).ras
        assert report.ras_steps == 5
        assert set(report.dense_calls) == {"dense step"}


@pytest.mark.parametrize("what", ["scale", "switch", "fuse with scale", "load"])
@pytest.mark.parametrize("move", ["model", "casting"])
def test_changes_are_noticed_beside_offloading_too(move, what):
    prepare, change = CHANGES[what]
    pipe = wan(prepare)
    MOVES[move](pipe)
    dit_accel.enable(pipe, ras=RAS)
    run(pipe, "wan", **changing(change))
    assert dit_accel.summary(pipe).ras.steps[CHANGE_AFTER + 1].dense_calls == {FRESH: 2}


def test_what_was_kept_of_an_earlier_run_is_no_change():
    """Weights that change between two runs add no dense step."""
    pipe = wan(add_adapter)
    dit_accel.enable(pipe, ras=RAS)
    run(pipe, "wan")
    pipe.transformer.set_adapters("one", 0.3)
    run(pipe, "wan")
    assert set(dit_accel.summary(pipe).ras.dense_calls) == {"dense step"}
    assert installation_of(pipe).clock.run.is_last_step
