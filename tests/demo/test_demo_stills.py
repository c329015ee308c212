import pytest
import torch

from dit_accel.demo.clips import STILL, Clips, centres, draw_clips, render_stills
from dit_accel.demo.config import ImageTrainConfig
from dit_accel.demo.report import judge_pipeline, judged_clips, score_clips
from dit_accel.demo.trainer import StableDiffusion3
from dit_accel.demo.vae import POSTERIOR_STD, normalise
from dit_accel.demo.vocabulary import TEMPLATES, caption, combinations
from dit_accel.sampling.settings import Sampling

CPU = torch.device("cpu")


def draw_stills(count: int, generator: torch.Generator, split: str = "train") -> Clips:
    return draw_clips(count, generator, split, STILL)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _triples(clips) -> list[tuple[int, int, int]]:
    return list(
        zip(clips.shape.tolist(), clips.colour.tolist(), clips.background.tolist(), strict=True)
    )


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    config = ImageTrainConfig(num_layers=1, num_heads=1, vae_base_dim=4)
    return StableDiffusion3(config, CPU, tmp_path_factory.mktemp("work"), progress=False)


@pytest.fixture(scope="module")
def pipe(trainer):
    trainer.pipeline.set_progress_bar_config(disable=True)
    return trainer.pipeline


@pytest.fixture(scope="module")
def texts() -> list[str]:
    texts = {
        caption(c, b, t, with_motion=False)
        for c in combinations()
        for b in range(6)
        for t in range(5)
    }
    return sorted(texts)


def test_a_still_keeps_to_its_split():
    train = set(_triples(draw_stills(2000, _generator())))
    heldout = set(_triples(draw_stills(300, _generator(), "heldout")))
    assert train == set(combinations("train"))
    assert heldout == set(combinations("heldout"))
    assert not train & heldout


def test_stills_vary_in_place_and_size_and_stay_in_frame():
    clips = draw_stills(400, _generator())
    images = render_stills(clips)
    assert images.shape == (400, 3, 64, 64)
    edge = torch.cat([images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], -1)
    torch.testing.assert_close(edge, images[..., 0, :1].expand_as(edge))
    place = centres(clips, 1, 64, 64)[:, 0]
    assert ((place - 32).abs().amax(0) > 0.1 * 64).all()
    assert clips.size.max() / clips.size.min() > 1.9


def test_captions_say_nothing_of_motion_and_fit(pipe, texts):
    assert len(texts) == 32 * (2 + 3 * 6)
    ids = pipe.tokenizer(texts).input_ids
    assert max(map(len, ids)) < pipe.tokenizer.model_max_length == 24
    assert not any(pipe.tokenizer.unk_token_id in row for row in ids)
    assert not any(word in text for text in texts for word in ("moving", "circling", "  "))


def test_every_caption_has_embeddings_of_its_own(pipe, texts):
    states, _, pooled, _ = pipe.encode_prompt(
        texts, None, None, do_classifier_free_guidance=False, max_sequence_length=8
    )
    assert torch.pdist(states.flatten(1)).min() > 5
    assert torch.pdist(pooled).min() > 0.05


@pytest.mark.parametrize("length", [16, 256])
def test_training_sees_what_the_pipeline_passes(trainer, pipe, length):
    prompts = ["a red circle", "a blue cross on a navy background", "a red circle"]
    states, empty, pooled, empty_pooled = pipe.encode_prompt(
        prompts, None, None, negative_prompt="", max_sequence_length=length
    )
    trainer.embed(prompts)
    dropped = torch.tensor([False, True, False])
    found, found_pooled = trainer.text(torch.arange(3), dropped, length)
    torch.testing.assert_close(found, torch.stack([states[0], empty[1], states[2]]))
    torch.testing.assert_close(found_pooled, torch.stack([pooled[0], empty_pooled[1], pooled[2]]))


def test_normalising_changes_the_latents_and_not_the_images(trainer):
    vae = type(trainer.vae).from_config(trainer.vae.config).requires_grad_(False)
    images = render_stills(draw_stills(16, _generator()))
    before = vae.encode(images).latent_dist.mean
    decoded = vae.decode(before).sample
    normalise(vae, before)
    posterior = vae.encode(images).latent_dist
    torch.testing.assert_close(posterior.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(posterior.mean.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, POSTERIOR_STD))
    torch.testing.assert_close(vae.decode(posterior.mean).sample, decoded, atol=1e-4, rtol=0)


def test_a_still_has_256_latent_tokens(trainer, pipe):
    latents, captions = trainer.encode_pool(3, 1, STILL)
    assert latents.shape == (3, 4, 16, 16)
    assert len(captions) == 3
    assert not any("moving" in text for text in captions)
    assert pipe.transformer.config.sample_size == 16


def test_clean_stills_are_judged_right_and_others_wrong():
    stills = judged_clips("train", 173, still=True)
    assert set(_triples(stills)) == set(combinations("train"))
    images = render_stills(stills)[:, :, None]
    records = score_clips(images, stills, still=True)
    assert sum(r["right"]["all"] for r in records) >= 172
    assert set(records[0]["right"]) == {"shape", "colour", "background", "all"}
    assert not any(
        r["right"]["all"]
        for r in score_clips(images.flip(0)[:64], stills[:64], still=True)
        if r["right"]["background"] is False
    )


def test_held_out_stills_are_asked_for_by_all_three():
    stills = judged_clips("heldout", 96, still=True)
    assert set(_triples(stills)) == set(combinations("heldout"))
    assert all("{background}" in TEMPLATES[t] for t in stills.template.tolist())


def test_report_of_an_image_pipeline(pipe):
    report = judge_pipeline(
        pipe,
        Sampling(height=32, width=32, num_inference_steps=1, max_sequence_length=8),
        num_clips=2,
        num_heldout=1,
        progress=False,
    )
    assert report["settings"]["num_frames"] is None
    assert list(report["summary"]["all"]) == ["shape", "colour", "background", "all"]
    assert [r["split"] for r in report["clips"]] == ["train", "train", "heldout"]
