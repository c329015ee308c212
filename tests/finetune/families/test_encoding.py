"""Conditions and latents are those that the pipelines themselves work with."""

import pytest
import torch

from dit_accel.finetune.families import trainable_of

from ...random_pipelines import relative
from .cases import latents, pipeline, trainable, with_text_encoder

FAMILIES = ("wan", "sd3", "lumina", "lumina2")
PROMPTS = ["a red circle moving right", "a blue square"]


@pytest.fixture(scope="module", params=FAMILIES)
def pipe(request):
    return with_text_encoder(request.param)


def calls_of(pipe, **arguments):
    """Return the arguments of the transformer in the first step of a call: (conditional, unconditional) keyword arguments."""
    seen = []

    def note(_module, _args, kwargs):
        seen.append(kwargs)

    handle = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        pipe(
            PROMPTS,
            height=64,
            width=64,
            num_inference_steps=1,
            guidance_scale=2.0,
            output_type="latent",
            **arguments,
        )
    finally:
        handle.remove()
    if len(seen) >= 2:
        return seen[0], seen[1]
    halves = {name: x.chunk(2) for name, x in seen[0].items() if torch.is_tensor(x) and len(x) == 4}
    # Stable Diffusion 3 puts the unconditional half first, Lumina-Next the conditional one.
    order = (1, 0) if "pooled_projections" in seen[0] else (0, 1)
    return tuple({name: x[i] for name, x in halves.items()} for i in order)


def same_conditions(found, used, rows):
    for name, x in found.items():
        real = used[name]
        length = min(x.shape[1], real.shape[1])  # Lumina-Next pads to the longest prompt of a call
        for i in range(rows):
            a, b = x[i % len(x)][:length], real[i][:length]
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        rest = x[:, length:]
        assert not rest.any()


def test_prompts_are_encoded_as_the_pipeline_encodes_them(pipe):
    short = {"max_sequence_length": 24}
    prepared = trainable_of(pipe, **short)
    conditional, unconditional = calls_of(pipe, **short)
    found = prepared.encode_prompts(PROMPTS)
    assert {len(x) for x in found.values()} == {2}
    same_conditions(found, conditional, 2)
    null = prepared.encode_null()
    assert {len(x) for x in null.values()} == {1}
    same_conditions(null, unconditional, 2)
    shapes = {name: x.shape[1:] for name, x in found.items()}
    assert {name: x.shape[1:] for name, x in null.items()} == shapes
    # Nothing of them depends on the other prompts of a call.
    alone = prepared.encode_prompts(PROMPTS[1:])
    for name, x in alone.items():
        assert x.shape[1:] == shapes[name]
        torch.testing.assert_close(x[0], found[name][1], rtol=1e-5, atol=1e-5)


def test_the_default_length_is_that_of_the_pipeline(pipe):
    prepared = trainable_of(pipe)
    found = prepared.encode_prompts(PROMPTS[:1])
    example = prepared.example_conditions(1)
    assert {k: x.shape for k, x in found.items()} == {k: x.shape for k, x in example.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_are_what_the_pipeline_decodes(family):
    pipe = with_text_encoder(family) if family in ("wan", "sd3") else pipeline(family)
    if family.startswith("lumina"):  # values that show
        pipe.vae.register_to_config(scaling_factor=0.3, shift_factor=0.2)
    prepared = trainable_of(pipe)
    frames = 5 if family == "wan" else 1
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, frames, 64, 64, generator=generator) * 2 - 1
    found = prepared.encode_pixels(pixels)
    assert found.dtype == torch.float32
    assert found.shape[1:] == prepared.latent_shape(64, 64, frames)
    config = pipe.vae.config
    # The inverse, as the last lines of the pipelines have it.
    if family == "wan":
        mean, std = (
            torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std)
        )
        raw = found / (1 / std) + mean
    elif family == "lumina":
        raw = found / config.scaling_factor
    else:
        raw = found / config.scaling_factor + config.shift_factor
    with torch.no_grad():
        expected = pipe.vae.encode(
            pixels if family == "wan" else pixels[:, :, 0]
        ).latent_dist.mode()
    assert relative(raw, expected) < 1e-5


@pytest.mark.parametrize("family", ["wan", "sd3", "lumina", "lumina2"])
def test_sizes_and_shift(family):
    prepared = trainable(family)
    assert prepared.name == family
    assert prepared.size_multiple == 16
    assert prepared.frames_rule == ((4, 1) if family == "wan" else (0, 1))
    assert prepared.flow_shift == 3.0
    assert len(latents(prepared).shape) == (5 if family == "wan" else 4)


def test_flow_shift_of_other_schedulers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    prepared = trainable_of(pipeline("wan", "unipc"))
    assert prepared.flow_shift == 3.0
    prepared.pipe.scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.5
    )
    assert prepared.flow_shift == pytest.approx(2.718281828)
    prepared.pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    assert prepared.flow_shift == 1.0


def test_what_cannot_be_encoded_is_refused():
    prepared = trainable("sd3")
    with pytest.raises(ValueError, match=r"^pixels: 2 frames; .*1"):
        prepared.encode_pixels(torch.zeros(1, 3, 2, 64, 64))
    with pytest.raises(ValueError, match=r"^pipe.text_encoder=None"):
        prepared.encode_prompts(["a"])
    with pytest.raises(ValueError, match=r"^pipe.text_encoder=None"):
        prepared.encode_null()
    prepared.pipe.vae = None
    with pytest.raises(ValueError, match=r"^pipe.vae=None"):
        prepared.encode_pixels(torch.zeros(1, 3, 1, 64, 64))


def test_models_that_cannot_be_tuned_are_refused():
    from diffusers import WanImageToVideoPipeline

    from ...tiny_wan import random_wan

    parts = random_wan(image_to_video=True)
    image_to_video = WanImageToVideoPipeline(**parts, image_processor=None, image_encoder=None)
    with pytest.raises(ValueError, match=r"^transformer: .*in_channels=12.*out_channels=4"):
        trainable_of(image_to_video)
    pipe = pipeline("wan")
    pipe.transformer = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"^transformer: Linear .*WanTransformer3DModel"):
        trainable_of(pipe)
    pipe.register_to_config(expand_timesteps=True)
    with pytest.raises(ValueError, match="expand_timesteps"):
        trainable_of(pipe)
