"""Parts that the Lumina-Image 2.0 model of the demo is trained from."""

import diffusers
import pytest
import torch
from torch.nn import functional as F

from dit_accel.demo.clips import STILL, draw_clips, render_stills
from dit_accel.demo.config import Lumina2TrainConfig
from dit_accel.demo.trainer import Lumina2
from dit_accel.demo.vocabulary import caption, combinations
from dit_accel.files import asset

PROMPTS = ["a red circle", "a blue cross on a navy background", "a red circle"]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    config = Lumina2TrainConfig(num_layers=1, num_heads=2, num_kv_heads=1)
    trainer = Lumina2(config, torch.device("cpu"), tmp_path_factory.mktemp("work"), progress=False)
    # The last layer starts at zero, which would hide the layers before it.
    torch.manual_seed(0)
    torch.nn.init.normal_(trainer.pipeline.transformer.norm_out.linear_2.weight, std=0.1)
    return trainer


@pytest.fixture(scope="module")
def pipe(trainer):
    trainer.pipeline.set_progress_bar_config(disable=True)
    return trainer.pipeline


def test_prompts_fit_with_the_system_prompt_before_them(trainer, pipe):
    texts = {
        caption(c, b, t, with_motion=False)
        for c in combinations()
        for b in range(6)
        for t in range(5)
    }
    start = f"{pipe.system_prompt} <Prompt Start> "
    ids = pipe.tokenizer([start + text for text in sorted(texts)]).input_ids
    assert not any(pipe.tokenizer.unk_token_id in row for row in ids)
    assert max(map(len, ids)) == 34 <= trainer.lengths[0]


def test_training_sees_what_the_pipeline_passes(trainer, pipe, monkeypatch):
    """The pipeline's calls of the transformer and its steps, compared with `Lumina2.velocity`."""
    calls, steps = [], []
    forward, step = pipe.transformer.forward, pipe.scheduler.step

    def record_call(**arguments):
        calls.append(arguments)
        return forward(**arguments)

    def record_step(velocity, t, latents, **options):
        steps.append((velocity, t / 1000, latents))
        return step(velocity, t, latents, **options)

    monkeypatch.setattr(pipe.transformer, "forward", record_call)
    monkeypatch.setattr(pipe.scheduler, "step", record_step)
    options = {"num_inference_steps": 2, "output_type": "latent", "cfg_normalization": False}
    pipe(PROMPTS, guidance_scale=2.0, generator=torch.Generator().manual_seed(0), **options)
    monkeypatch.undo()
    assert len(calls) == 4  # with the prompt and without, at two steps
    trainer.embed(PROMPTS)
    [length] = trainer.lengths

    @torch.no_grad()
    def velocity_of(latents, sigma, dropped):
        text = trainer.text(torch.arange(3), torch.tensor(dropped), length)
        return trainer.velocity(latents, sigma.expand(3), text)

    for velocity, sigma, latents in steps:
        prompted, empty = (velocity_of(latents, sigma, [x] * 3) for x in (False, True))
        torch.testing.assert_close(empty + 2 * (prompted - empty), velocity, atol=1e-4, rtol=0)
        assert (prompted - empty).abs().max() > 1e-3
    # Rows of one batch may have the prompt and the empty one side by side.
    mixed = velocity_of(latents, sigma, [False, True, False])
    expected = torch.stack([prompted[0], empty[1], prompted[2]])
    torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=0)


def test_padding_of_the_text_changes_nothing(trainer, pipe):
    found = [
        pipe(
            "a red circle",
            num_inference_steps=2,
            max_sequence_length=length,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
        for length in (*trainer.lengths, 256)
    ]
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)


def test_the_time_decides_the_output_from_the_start(pipe):
    embedder = pipe.transformer.time_caption_embed
    times = torch.linspace(0, 1, 9)
    features = F.silu(embedder.timestep_embedder.linear_1(embedder.time_proj(times)))
    changes = (features[1:] - features[:-1]).norm(dim=1)
    assert changes.min() > 0.1 * features.norm(dim=1).mean()


def test_a_doubled_vae_starts_as_the_given_one(trainer):
    vae = diffusers.AutoencoderKL.from_pretrained(asset("tiny-sd3") / "vae")
    large = render_stills(
        draw_clips(8, torch.Generator().manual_seed(0), placement=STILL), 128, 128
    )
    with torch.no_grad():
        expected = vae.encode(F.avg_pool2d(large, 2)).latent_dist.mean
        doubled = trainer.vae
        found = doubled.encode(large).latent_dist.mean
        assert found.shape == expected.shape == (8, 4, 16, 16)
        assert (found - expected).norm() < 0.2 * expected.norm()
        drawn = doubled.decode(expected).sample
        small = F.interpolate(vae.decode(expected).sample, scale_factor=2)
    assert (drawn - small).abs().mean() < 0.03
    assert doubled.config.sample_size == 128


def test_images_have_the_size_that_the_pipeline_makes_by_default(trainer, pipe):
    side = pipe.default_sample_size * pipe.vae_scale_factor
    assert side == trainer.side == pipe.vae.config.sample_size
    assert pipe("a red circle", num_inference_steps=1).images[0].size == (side, side)
