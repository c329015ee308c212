import pytest
import torch

from dit_accel.demo.clips import draw_clips, render
from dit_accel.demo.config import TrainConfig
from dit_accel.demo.dit import SHORT_TEXT, CaptionTable
from dit_accel.demo.text import build_text_encoder, build_tokenizer, embed
from dit_accel.demo.trainer import encode_pool
from dit_accel.demo.vae import build_vae, decode_clip, encode_clip, whole_clip
from dit_accel.demo.vocabulary import caption, combinations


@pytest.fixture(scope="module")
def text():
    tokenizer = build_tokenizer()
    return build_text_encoder(len(tokenizer)), tokenizer


def test_every_caption_tokenizes_into_known_words_and_fits(text):
    _, tokenizer = text
    captions = {caption(c, b, t) for c in combinations() for b in range(6) for t in range(5)}
    ids = tokenizer(sorted(captions)).input_ids
    assert max(map(len, ids)) <= SHORT_TEXT
    assert not any(tokenizer.unk_token_id in row for row in ids)
    assert len({tuple(row) for row in ids}) == len(captions)


def test_prompts_that_differ_in_one_word_have_distinct_embeddings(text):
    prompts = [
        "a red circle circling clockwise",
        "a red circle circling counterclockwise",
        "a red circle moving left",
        "a red circle moving right",
        "a red square moving right",
        "a blue square moving right",
    ]
    states = embed(*text, prompts).flatten(1)
    assert torch.pdist(states).min() > 1.0


def test_embeddings_are_what_the_pipeline_makes(text):
    from diffusers import WanPipeline

    encoder, tokenizer = text
    pipe = WanPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=None, scheduler=None, transformer=None
    )
    prompts = ["a red circle moving right", "", "a zebra, jumping"]
    wanted = pipe._get_t5_prompt_embeds(prompts, max_sequence_length=32, device=torch.device("cpu"))
    torch.testing.assert_close(embed(encoder, tokenizer, prompts, 32), wanted)


def test_the_caption_table_holds_each_clips_own_caption(text):
    encoder, tokenizer = text
    clips = draw_clips(16, torch.Generator().manual_seed(0), "all")
    table = CaptionTable(encoder, tokenizer, torch.device("cpu"))
    empty = torch.tensor([True] + [False] * 15)
    states = table.lookup(table.index(clips), empty, 64)
    wanted = embed(encoder, tokenizer, ["", *clips.captions()[1:]], 64)
    torch.testing.assert_close(states, wanted)


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_the_whole_clip_forward_equals_the_chunked_one(frames):
    vae = build_vae(base_dim=8)
    video = render(draw_clips(2, torch.Generator().manual_seed(0)), frames, 32, 48)
    with torch.no_grad():
        with whole_clip(vae):
            latents = encode_clip(vae, video)
            decoded = decode_clip(vae, latents)
        chunked = vae.encode(video).latent_dist.mean
        chunked_decoded = vae.decode(chunked).sample
    assert latents.shape == (2, 8, (frames - 1) // 2 + 1, 4, 6)
    torch.testing.assert_close(latents, chunked, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(decoded.clamp(-1, 1), chunked_decoded, atol=1e-5, rtol=1e-4)


def test_a_clip_has_more_than_a_thousand_latent_tokens():
    config = TrainConfig()
    latents, clips = encode_pool(
        build_vae(8), 2, 33, config.seed, torch.device("cpu"), progress=False
    )
    assert latents[0, 0].numel() == 1088
    assert len(clips) == 2
