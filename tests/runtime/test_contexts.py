"""Contexts: calls with different conditions do not mix, and their caches are freed with the run."""

import contextlib
import gc
import threading
import warnings
import weakref

import pytest
import torch

import dit_accel
from dit_accel.config import SLAConfig
from dit_accel.runtime.install import installation_of

from ..random_pipelines import BLOCKS, FAMILIES, embeddings, make, relative, run, scheduler
from .own_loops import BOTH, RAS, SLA, Conditions, steps_of

every_family = pytest.mark.parametrize("family", FAMILIES)
ALL_TOKENS = {**RAS, "ratio": 1.0}
"""All tokens run, so the output has to equal that of the plain pipeline."""


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# Second calls with the same text --------------------------------------------------------------------


@contextlib.contextmanager
def perturbed(block):
    """Skip a block, or its effect on the image, like perturbed-attention and skip-layer guidance."""
    block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    try:
        yield
    finally:
        del block.forward


@torch.no_grad()
def guided_loop(pipe, family, own_tensors, guided=range(10)):
    """Sample with a perturbed second call; with `own_tensors` it has its own text tensors."""
    made = scheduler("euler")
    made.set_timesteps(10)
    conditions = Conditions(family)
    latents, text = conditions.latents, conditions.text
    again = text.clone() if own_tensors else text
    block = BLOCKS[family](pipe.transformer)[-1]
    with dit_accel.sampling_loop(pipe.transformer, made):
        for i, t in enumerate(made.timesteps):
            velocity = conditions.velocity(pipe.transformer, latents, t.expand(1), text)
            if i in guided:
                with perturbed(block):
                    weak = conditions.velocity(pipe.transformer, latents, t.expand(1), again)
                velocity = velocity + 2 * (velocity - weak)
            latents = made.step(velocity, t, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize(
    ("family", "guided"),
    [("wan", range(3, 8)), ("lumina", range(10)), ("lumina2", range(10))],
    ids=["wan", "lumina", "lumina2"],
)
def test_a_perturbed_call_with_the_same_text(family, guided):
    pipe = make(family)
    plain = guided_loop(pipe, family, False, guided)
    for on in ({"ras": RAS}, BOTH):
        dit_accel.enable(pipe, **on)
        expected = guided_loop(pipe, family, True, guided)
        counts = steps_of(dit_accel.summary(pipe))
        same(guided_loop(pipe, family, False, guided), expected)
        assert steps_of(dit_accel.summary(pipe)) == counts
        assert 1e-5 < relative(expected, plain) < 0.3
        dit_accel.disable(pipe)
    dit_accel.enable(pipe, ras=ALL_TOKENS)
    assert relative(guided_loop(pipe, family, False, guided), plain) < 1e-5


SKIP = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.05}


@pytest.mark.parametrize("prompts", [(0,), (0, 1)], ids=["one", "two"])
@pytest.mark.parametrize("family", ["sd3", "sd35"])
def test_skip_layer_guidance_of_the_pipeline(family, prompts):
    changed = {**SKIP, "skip_layer_guidance_stop": 0.8}
    pipe = make(family)
    plain = run(pipe, family, prompts, **changed)
    dit_accel.enable(pipe, ras=ALL_TOKENS)
    assert relative(run(pipe, family, prompts, **changed), plain) < 1e-5
    dit_accel.enable(pipe, **BOTH)
    both = run(pipe, family, prompts, **changed)
    report = dit_accel.summary(pipe, strict=True)
    assert report.ras.ras_steps == 7
    assert 1e-5 < relative(both, plain) < 0.3
    same(run(pipe, family, prompts, **changed), both)


def image_to_video():
    """Return a Wan transformer that is conditioned on image embeddings."""
    from diffusers import WanTransformer3DModel

    pipe = make("wan")
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        **{**pipe.transformer.config, "image_dim": 8, "added_kv_proj_dim": 24}
    ).eval()
    for parameter in transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return transformer


@torch.no_grad()
def image_guided(transformer, tensors):
    made = scheduler("unipc")
    made.set_timesteps(10)
    conditions = Conditions("wan")
    latents = conditions.latents
    text = torch.randn(1, 512, 24, generator=torch.Generator().manual_seed(2))
    image = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(3))
    blank = torch.zeros_like(image)
    with dit_accel.sampling_loop(transformer, made):
        for t in made.timesteps:
            calls = []
            for picture in (image, blank):
                words = text
                if tensors == "own text":
                    words = (
                        text
                        if picture is image
                        else conditions.arguments.setdefault("t", text.clone())
                    )
                if tensors == "made anew" and picture is blank:
                    picture = torch.zeros_like(image)
                calls.append(
                    transformer(
                        latents,
                        t.expand(1),
                        words,
                        encoder_hidden_states_image=picture,
                        return_dict=False,
                    )[0]
                )
            velocity = calls[0] + 2 * (calls[0] - calls[1])
            latents = made.step(velocity, t, latents, return_dict=False)[0]
    return latents


def test_image_guidance_with_the_same_text():
    transformer = image_to_video()
    plain = image_guided(transformer, "same text")
    dit_accel.enable(transformer, ras=ALL_TOKENS)
    for tensors in ("same text", "own text", "made anew"):
        assert relative(image_guided(transformer, tensors), plain) < 1e-5
    dit_accel.enable(transformer, **BOTH)
    expected = image_guided(transformer, "own text")
    same(image_guided(transformer, "same text"), expected)
    assert dit_accel.summary(transformer).ras.ras_steps == 7
    image_guided(transformer, "made anew")  # the blank picture is a new context in every step
    report = dit_accel.summary(transformer).ras
    assert report.dense_calls["first call of a context"] == 7
    assert report.ras_steps == 7


# Changes in mid-run ---------------------------------------------------------------------------------


def changing(family, change, **changed):
    """Return arguments of a pipeline call that changes its embeddings after step 4."""
    names = ["prompt_embeds"]
    names += {"wan": ["negative_prompt_embeds"], "sd3": ["pooled_prompt_embeds"]}.get(family, [])

    def callback(pipe, step, timestep, kwargs):
        if step == 4:
            kwargs["prompt_embeds"] = change(kwargs["prompt_embeds"])
        return kwargs

    return {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": names,
        **changed,
    }


def in_place(x):
    return x.mul_(-1)


def anew(x):
    return -x


@pytest.mark.parametrize(
    ("family", "change"),
    [("wan", anew), ("wan", in_place), ("sd3", in_place), ("lumina2", anew)],
)
def test_embeddings_changed_in_mid_run(family, change):
    pipe = make(family)
    plain = run(pipe, family, **changing(family, change))
    dit_accel.enable(pipe, ras=ALL_TOKENS)
    assert relative(run(pipe, family, **changing(family, change)), plain) < 1e-5
    dit_accel.enable(pipe, **BOTH)
    result = run(pipe, family, **changing(family, change))
    same(result, run(pipe, family, **changing(family, anew)))
    report = dit_accel.summary(pipe).ras
    assert report.steps[5].dense_calls.get("first call of a context") == 1
    assert report.steps[6].mode == "partial"


@pytest.mark.parametrize("what", ["replaced", "in place"])
def test_a_text_mask_changed_in_mid_run(what):
    pipe = make("lumina2")
    mask = embeddings("lumina2", [0])["prompt_attention_mask"]

    @torch.no_grad()
    def loop():
        made = scheduler("euler")
        made.set_timesteps(8)
        conditions = Conditions("lumina2")
        latents, own = conditions.latents, mask.clone()
        with dit_accel.sampling_loop(pipe.transformer, made):
            for i, t in enumerate(made.timesteps):
                if i == 4:
                    own = own if what == "in place" else own.clone()
                    own[:, :9] = 1
                conditions.arguments["encoder_attention_mask"] = own
                velocity = conditions.velocity(pipe.transformer, latents, t.expand(1))
                latents = made.step(velocity, t, latents, return_dict=False)[0]
        return latents

    plain = loop()
    dit_accel.enable(pipe, ras=ALL_TOKENS)
    assert relative(loop(), plain) < 1e-5


@pytest.mark.parametrize(
    ("family", "rows"),
    [
        *(("wan", (1, 2)), ("sd3", (2, 1)), ("sd3", (2, 3))),
        *(("lumina", (2, 3)), ("lumina2", (1, 2)), ("lumina2", (2, 1))),
    ],
    ids=str,
)
def test_batches_and_sizes_that_change_in_mid_run(family, rows):
    pipe = make(family)

    @torch.no_grad()
    def loop(size=1):
        made = scheduler("euler")
        made.set_timesteps(10)
        outputs = []
        with dit_accel.sampling_loop(pipe.transformer, made):
            for i, t in enumerate(made.timesteps):
                n = rows[i >= 5]
                if i in (0, 5):
                    conditions = Conditions(family, 0, n)
                    latents = conditions.latents[..., : None if i or size else -4]
                velocity = conditions.velocity(pipe.transformer, latents, t.expand(n))
                outputs.append(velocity)
                latents = latents - 0.1 * velocity
        return outputs

    for size in (0, 1):
        plain = loop(size)
        dit_accel.enable(pipe, ras=ALL_TOKENS)
        for a, b in zip(loop(size), plain, strict=True):
            assert relative(a, b) < 1e-5
        dit_accel.enable(pipe, ras=RAS)
        found = [torch.equal(a, b) for a, b in zip(loop(size), plain, strict=True)]
        assert found[:2] == [True, True]
        modes = [x.mode for x in dit_accel.summary(pipe).ras.steps]
        assert modes == ["dense"] * 2 + ["partial"] * 3 + ["dense"] + ["partial"] * 3 + ["dense"]
        dit_accel.disable(pipe)


# Ends and interrupts --------------------------------------------------------------------------------


def buffers(pipe):
    """Return weak references to the caches of all contexts of the current run."""
    kept = [x.states.get("ras") for x in installation_of(pipe).clock.run.contexts.values()]
    return [weakref.ref(k.last.data) for x in kept if x is not None for k, _ in x.kv.values()]


def alive(references):
    return len([x for x in references if x() is not None])


def guidance_off(pipe, step, timestep, kwargs):
    if step == 4:
        pipe._guidance_scale = 1.0
    return kwargs


def stop(pipe, step, timestep, kwargs):
    if step == 4:
        pipe._interrupt = True
    return kwargs


def fail(pipe, step, timestep, kwargs):
    if step == 4:
        raise ZeroDivisionError
    return kwargs


def texts(family):
    """Return embeddings that the caller of a pipeline keeps."""
    text = embeddings(family, [0])
    return text | {f"negative_{name}": x for name, x in embeddings(family, [-3]).items()}


def run_and_look(pipe, family, what, **changed):
    """Return references to the caches after step 3 of a run in which `what` happens after step 4."""
    seen = []

    def look(pipe, step, timestep, kwargs):
        if step == 3:
            seen.extend(buffers(pipe))
        return what(pipe, step, timestep, kwargs)

    with contextlib.suppress(ZeroDivisionError):
        run(pipe, family, callback_on_step_end=look, **changed)
    gc.collect()
    assert seen
    return seen


@pytest.mark.parametrize("family", ["wan", "lumina2"])
def test_memory_returns_though_guidance_ended_before_the_run(family):
    pipe = make(family)
    dit_accel.enable(pipe, **BOTH)
    kept = texts(family)  # with them go all caches
    assert alive(run_and_look(pipe, family, guidance_off, **kept)) == 0
    del kept


@pytest.mark.parametrize(("family", "what"), [("wan", stop), ("sd3", fail)])
def test_memory_returns_after_a_run_that_stops_early(family, what):
    pipe = make(family)
    dit_accel.enable(pipe, **BOTH)
    expected = run(pipe, family)
    assert alive(run_and_look(pipe, family, what)) == 0
    same(run(pipe, family), expected)
    # With embeddings that the caller keeps, at the latest when the next run begins.
    kept = texts(family)
    seen = run_and_look(pipe, family, what, **kept)
    same(run(pipe, family), expected)
    assert alive(seen) == 0
    del kept


@contextlib.contextmanager
def raising(block, error, at):
    """Context manager in which a block raises an error in its `at`-th call."""
    calls = []

    def count(*_):
        calls.append(1)
        if len(calls) == at:
            raise error

    handle = block.register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("family", "error"),
    [
        *((x, RuntimeError) for x in FAMILIES),
        *(("wan", KeyboardInterrupt), ("sd3", SystemExit)),
    ],
)
def test_errors_inside_of_a_block(family, error):
    pipe = make(family)
    dit_accel.enable(pipe, **BOTH)
    expected = run(pipe, family)
    counts = steps_of(dit_accel.summary(pipe))
    seen = []

    def look(pipe, step, timestep, kwargs):
        seen.extend(buffers(pipe))
        return kwargs

    block = BLOCKS[family](pipe.transformer)[1]
    with raising(block, error, 8), pytest.raises(error):
        run(pipe, family, (1,), callback_on_step_end=look)
    same(run(pipe, family), expected)
    assert steps_of(dit_accel.summary(pipe)) == counts


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("family", ["wan", "sd3"])
def test_memory_returns_after_an_error_inside_of_a_block(family, error):
    pipe = make(family)
    dit_accel.enable(pipe, **BOTH)
    seen = []

    def look(pipe, step, timestep, kwargs):
        seen.extend(buffers(pipe))
        return kwargs

    block = BLOCKS[family](pipe.transformer)[1]
    with contextlib.suppress(error), raising(block, error, 10):
        run(pipe, family, callback_on_step_end=look)
    assert seen
    if error is KeyboardInterrupt:
        run(pipe, family, steps=1)  # torch skips the hook that ends a call: the next call lets go
    gc.collect()
    assert alive(seen) == 0


def test_another_thread_may_go_on_after_an_interrupt():
    pipe = make("sd3")
    dit_accel.enable(pipe, **BOTH)
    expected = run(pipe, "sd3")
    block = pipe.transformer.transformer_blocks[1]
    with raising(block, KeyboardInterrupt, 5), pytest.raises(KeyboardInterrupt):
        run(pipe, "sd3")
    results = []

    def work():
        try:
            results.append(run(pipe, "sd3"))
        except RuntimeError as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(120)
    [found] = results
    assert isinstance(found, torch.Tensor), found
    same(found, expected)


@torch.no_grad()
def test_calls_that_stay_in_one_step_keep_no_more_and_more():
    pipe = make("lumina2")
    dit_accel.enable(pipe, ras=RAS)
    pipe.scheduler.set_timesteps(20)  # and nobody steps it
    conditions = Conditions("lumina2")
    kept = []
    for _ in range(30):
        conditions.velocity(pipe.transformer, conditions.latents, torch.full((1,), 0.5))
        kept.append(len(installation_of(pipe).clock.run.contexts))
    assert kept[-1] == kept[8] <= 8


# The warning of idle runs ---------------------------------------------------------------------------


def warned(pipe, family, **changed):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run(pipe, family, **changed)
    return [str(x.message) for x in said if "dit_accel" in str(x.message)]


@pytest.mark.parametrize(
    ("on", "reason"),
    [
        ({"ras": {**RAS, "warmup": 1.0}}, "dense steps only"),
        ({"sla": {**SLA, "dense_steps": 1.0}}, "dense step"),
        ({"sla": {**SLA, "block_q": 128, "block_k": 128, "order": "raster"}}, "one block"),
        ({"sla": "balanced"}, ""),
        ({"ras": {**RAS, "warmup": 1.0}, "sla": {**SLA, "dense_steps": 1.0}}, "dense steps only"),
    ],
    ids=["ras", "sla", "sla, short", "sla, crossover", "both"],
)
@pytest.mark.parametrize("family", ["wan", "sd3"])
def test_an_idle_run_warns_once_for_each_reason(family, on, reason):
    pipe = make(family)
    dit_accel.enable(pipe, **on)
    changed = {"height": 64, "width": 64} if "128" in str(on) else {}
    said = warned(pipe, family, steps=4, **changed)
    assert len(said) == 1
    assert reason in said[0]
    for name in on:
        assert name in said[0]
    assert not warned(pipe, family, steps=4, **changed)
    assert not warned(pipe, family, steps=6, **changed)


@every_family
def test_a_run_in_which_one_method_worked_says_nothing(family):
    pipe = make(family)
    dit_accel.enable(pipe, **BOTH)
    assert not warned(pipe, family, steps=6)


@every_family
def test_a_schedule_that_leaves_a_method_nothing_is_said_before_the_first_step(family):
    pipe = make(family)
    for on, text in (
        (
            {"ras": RAS, "sla": {**SLA, "dense_steps": 0.99}},
            "sla: every step is a dense step (6 steps, dense_steps=0.99; sla='few-step' has no dense steps)",
        ),
        (
            {"ras": "quality", "sla": {**SLA, "dense_steps": 0}},
            "ras: the schedule has dense steps only (5 steps, warmup 3, tail 2, budget 0.85; ras='few-step' leaves out 1)",
        ),
        (
            {"ras": "few-step"},
            "ras: the schedule has dense steps only (3 steps, warmup 2, tail 1, budget 0.85; nothing can be left out of "
            "so few steps)",
        ),
    ):
        dit_accel.enable(pipe, sla="none", ras="none") if "sla" not in on else None
        dit_accel.enable(pipe, **on)
        ends = []

        def callback(pipe, step, timestep, kwargs, ends=ends):
            ends.append(step)
            return kwargs

        steps = int(text.split("(")[1].split(" ")[0])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning) as said:
                run(pipe, family, steps=steps, callback_on_step_end=callback)
        assert str(said.value).endswith(f"nothing to do for {text}")
        assert not ends
        assert not warned(pipe, family, steps=steps)


@pytest.mark.parametrize("steps", [4, 5, 6, 7, 8])
@pytest.mark.combines("few-step")
def test_the_presets_for_few_steps_have_something_to_do(steps):
    pipe = make("sd3")
    dit_accel.enable(pipe, ras="few-step", sla={**SLA, **SLAConfig.PRESETS["few-step"]})
    assert not warned(pipe, "sd3", steps=steps)
    report = dit_accel.summary(pipe, strict=True)
    left_out = [x.mode == "forecast" for x in report.ras.steps]
    assert sum(left_out) == (1 if steps < 7 else 2)
    assert not left_out[0]
    assert not left_out[-1]
    assert "dense step" not in report.dense_calls


@pytest.mark.parametrize(("first", "second"), [(1, 1.0), (1.0, 1)])
def test_one_step_and_all_steps_are_other_settings(first, second):
    pipe = make("sd3")
    dit_accel.enable(pipe, sla={**SLA, "dense_steps": first})
    dit_accel.enable(pipe, sla={**SLA, "dense_steps": second})
    run(pipe, "sd3", steps=4)
    assert (dit_accel.summary(pipe).sparse_calls > 0) == (second == 1 and isinstance(second, int))


def test_another_reason_is_said_too():
    pipe = make("sd3")
    dit_accel.enable(pipe, ras={**RAS, "warmup": 3})
    assert len(warned(pipe, "sd3", steps=4)) == 1
    assert len(warned(pipe, "sd3", steps=8, height=48, width=64)) == 1
    assert not warned(pipe, "sd3", steps=8)
