"""Parts of tiny-wan in training."""

import copy

import pytest
import torch

from dit_accel.demo.clips import CENTRAL, draw_clips, render
from dit_accel.demo.config import TrainConfig
from dit_accel.demo.trainer import Wan
from dit_accel.demo.vae import normalise
from dit_accel.demo.vocabulary import caption, combinations

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    config = TrainConfig(vae_base_dim=8, num_layers=1, num_heads=1, ffn_dim=64)
    return Wan(config, CPU, tmp_path_factory.mktemp("work"), progress=False)


def test_every_caption_tokenizes_into_known_words_and_fits(trainer):
    tokenizer = trainer.pipeline.tokenizer
    captions = {caption(c, b, t) for c in combinations() for b in range(6) for t in range(5)}
    ids = tokenizer(sorted(captions)).input_ids
    assert max(map(len, ids)) <= trainer.lengths[0]
    assert not any(tokenizer.unk_token_id in row for row in ids)
    assert len({tuple(row) for row in ids}) == len(captions)


def test_prompts_that_differ_in_one_word_have_distinct_embeddings(trainer):
    prompts = [
        "a red circle circling clockwise",
        "a red circle circling counterclockwise",
        "a red circle moving left",
        "a red circle moving right",
        "a red square moving right",
        "a blue square moving right",
    ]
    trainer.embed(prompts)
    assert torch.pdist(trainer.tables[16][0][:6].flatten(1)).min() > 1.0


@pytest.mark.parametrize("length", [16, 512])
def test_training_sees_what_the_pipeline_passes(trainer, length):
    clips = draw_clips(6, torch.Generator().manual_seed(0), "all")
    prompts = clips.captions()
    trainer.embed([*prompts, prompts[2]])
    rows, empty = torch.tensor([0, 6, 3]), torch.tensor([True, False, False])
    (states,) = trainer.text(rows, empty, length)
    wanted, _ = trainer.pipeline.encode_prompt(
        ["", prompts[2], prompts[3]],
        do_classifier_free_guidance=False,
        max_sequence_length=length,
    )
    torch.testing.assert_close(states, wanted)


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_the_whole_clip_forward_equals_the_chunked_one(trainer, frames):
    vae = trainer.vae
    chunked = type(vae).from_config(vae.config)
    chunked.load_state_dict(vae.state_dict())
    video = render(draw_clips(2, torch.Generator().manual_seed(0)), frames, 32, 48)
    with torch.no_grad():
        latents = vae.encode(video).latent_dist.mean
        decoded = vae.decode(latents).sample
        expected = chunked.encode(video).latent_dist.mean
        expected_video = chunked.decode(expected).sample
    assert latents.shape == (2, 8, (frames - 1) // 2 + 1, 4, 6)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(decoded.clamp(-1, 1), expected_video, atol=1e-5, rtol=1e-4)


def test_normalising_changes_the_latents_and_not_the_clips(trainer):
    vae = type(trainer.vae).from_config(trainer.vae.config)
    vae.load_state_dict(trainer.vae.state_dict())
    video = render(draw_clips(4, torch.Generator().manual_seed(0)), 5, 32, 32)
    with torch.no_grad():
        before = vae.encode(video).latent_dist.mean
        decoded = vae.decode(before).sample
        normalise(vae, before)
        after = vae.encode(video).latent_dist.mean
        torch.testing.assert_close(vae.decode(after).sample, decoded, atol=1e-4, rtol=0)
    torch.testing.assert_close(after.mean((0, 2, 3, 4)), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.std((0, 2, 3, 4)), torch.ones(8), atol=1e-4, rtol=0)
    assert vae.config.latents_std == [1.0] * 8


def test_a_clip_has_more_than_a_thousand_latent_tokens(trainer):
    latents, captions = trainer.encode_pool(2, 33, CENTRAL)
    assert latents[0, 0].numel() == 1088
    assert len(captions) == 2
    again, other = trainer.encode_pool(2, 33, CENTRAL), copy.copy(trainer)
    assert torch.equal(latents, again[0])
    other.config = trainer.config | {"seed": 1}
    assert not torch.equal(latents, other.encode_pool(2, 33, CENTRAL)[0])
