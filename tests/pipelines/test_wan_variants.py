"""Further pipelines and layouts of the Wan family: TI2V, VACE, first and last frame, video-to-video."""

import json

import numpy as np
import pytest
import torch

import dit_accel
from dit_accel.models import family_of
from dit_accel.runtime.install import method_of

from ..random_families import wan22, wan22_ti2v, wan_i2v, wan_vace
from ..random_pipelines import make, randomise, relative, run

SLA = {
    "topk": 0.4,
    "block_q": 16,
    "block_k": 16,
    "crossover": "never",
    "dense_steps": 0,
    "dense_layers": 0,
}
RAS = {"ratio": 0.5, "warmup": 2, "tail": 1, "resets": []}


def check(pipe, call, steps):
    """Settings that read and run everything change nothing, others run, and `disable` restores the plain latents."""
    pipe.set_progress_bar_config(disable=True)
    plain = call()
    dit_accel.enable(pipe, sla={**SLA, "topk": 1.0}, ras={**RAS, "ratio": 1.0})
    assert relative(call(), plain) < 1e-5
    modes = [not x.dense_calls for x in dit_accel.summary(pipe).ras.steps]
    assert modes == [False, False, *[True] * (steps - 3), False]
    dit_accel.enable(pipe, sla=SLA, ras=RAS)
    changed = call()
    assert 1e-4 < relative(changed, plain) < 1
    torch.testing.assert_close(call(), changed, rtol=0, atol=0)
    report = dit_accel.summary(pipe, strict=True)
    dit_accel.disable(pipe)
    torch.testing.assert_close(call(), plain, rtol=0, atol=0)
    return report, plain, changed


# One timestep for each token (Wan2.2 TI2V) ---------------------------------------------------------------


@pytest.mark.parametrize(("solver", "image"), [("euler", True), ("unipc", True), ("dpm++", False)])
def test_timesteps_by_token(solver, image):
    pipe = wan22_ti2v.make(solver, image_to_video=image)
    call = wan22_ti2v.embeddings([0]) | wan22_ti2v.arguments([0], 2.0)
    if not image:
        del call["image"]

    def latents():
        generator = torch.Generator().manual_seed(0)
        more = {"num_inference_steps": 7, "output_type": "latent", "generator": generator}
        return pipe(**call | more).frames

    _, plain, changed = check(pipe, latents, 7)
    if image:  # the first frame is the picture, whatever the transformer returns there
        torch.testing.assert_close(changed[:, :, 0], plain[:, :, 0], rtol=0, atol=0)


def test_timesteps_by_token_are_those_of_the_tokens_that_run():
    pipe = make("wan22_ti2v", "euler")
    dit_accel.enable(pipe, ras={**RAS, "ratio": 0.6, "selection": "age"})
    seen = []

    def keep(module, args, output):
        seen.append((args[0], method_of(pipe, "ras").index))

    pipe.transformer.condition_embedder.register_forward_hook(keep)
    run(pipe, "wan22_ti2v", steps=6, guidance=1.0)
    frame = 7 * 9
    partial = [(t, index) for t, index in seen if index is not None]
    assert len(partial) == 3
    for timestep, index in partial:
        assert timestep.shape == (index.numel(),)
        first = index.flatten() < frame
        assert (timestep[first] == 0).all()
        assert (timestep[~first] > 0).all()
    assert any((index < frame).any() for _, index in partial)


def test_other_numbers_of_timesteps_are_refused():
    pipe = make("wan22_ti2v")
    dit_accel.enable(pipe, sla=SLA)
    text = wan22.embeddings([0])["prompt_embeds"]
    with pytest.raises(ValueError, match=r"timestep: .*\(1, 7\).*4 tokens"):
        pipe.transformer(torch.randn(1, 8, 1, 4, 4), torch.ones(1, 7), text)


def test_modulation_of_tokens_is_counted():
    """Modulation at real size: 6 d^2 for each token in addition to 30 layers."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        transformer = WanTransformer3DModel(
            num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48
        )
        call = {
            "hidden_states": torch.empty(1, 48, 31, 44, 80),
            "timestep": torch.empty(1, 31 * 22 * 40),
            "encoder_hidden_states": torch.empty(1, 512, 4096),
        }
    found = family_of(transformer).call(transformer, call)
    assert found.grid == (31, 22, 40)
    assert found.token_flops == pytest.approx(2 * 7 * 3072**2, rel=0.02)


def test_sizes_of_ti2v_are_multiples_of_32(tmp_path):
    wan22_ti2v.make("unipc", image_to_video=False).save_pretrained(tmp_path)
    pipe = dit_accel.SparseWanPipeline.from_pretrained(
        tmp_path, text_encoder=None, tokenizer=None, ras="balanced"
    )
    with pytest.raises(ValueError, match=r"height=48: .*32"):
        pipe("a cat", height=48, width=64, num_frames=5)
    estimate = dit_accel.estimate_memory(pipe, height=224, width=288, num_frames=9, ras=RAS)
    assert estimate.kv_bytes > 0


# VACE -----------------------------------------------------------------------------------------------


def vace_call(pipe, **changed):
    generator = torch.Generator().manual_seed(3)
    video = torch.rand(1, 9, 3, 112, 144, generator=generator)
    mask = (
        (torch.rand(1, 9, 1, 112, 144, generator=generator) > 0.5).float().expand(-1, -1, 3, -1, -1)
    )
    call = wan22.embeddings([0]) | wan22.arguments([0], 2.0)
    call |= {"video": video, "mask": mask, "num_inference_steps": 7, "output_type": "latent"}

    def latents():
        return pipe(**call | {"generator": torch.Generator().manual_seed(0)} | changed).frames

    return latents


def plain_vace():
    pipe = wan_vace.make("unipc")
    del pipe.prepare_video_latents, pipe.prepare_masks  # diffusers' own
    return pipe


@pytest.mark.parametrize("pictures", [0, 2])
def test_vace_with_video_mask_and_reference_pictures(pictures):
    pipe = plain_vace()
    refs = [_picture(np.random.default_rng(i).random((112, 144, 3))) for i in range(pictures)]
    refs = refs or None
    call = vace_call(pipe, reference_images=refs, conditioning_scale=[0.7, 1.3])
    report, plain, _ = check(pipe, call, 7)
    assert report.ras.steps[0].tokens == (3 + pictures) * 7 * 9
    assert relative(vace_call(pipe, reference_images=refs)(), plain) > 1e-4  # the scale counts
    names = [x.name for x in report.layers]
    assert names == [f"vace_blocks.{i}.attn1" for i in range(2)] + [
        f"blocks.{i}.attn1" for i in range(3)
    ]
    assert report.cross_attention_dense_calls == 5 * 2 * 7


@torch.no_grad()
def test_a_control_of_fewer_frames_ends_in_zeros():
    """Missing control tokens are zeros at the end, also if tokens run in another order."""
    pipe = plain_vace()
    generator = torch.Generator().manual_seed(0)
    call = {
        "hidden_states": torch.randn(1, 4, 3, 14, 18, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": wan22.embeddings([0])["prompt_embeds"],
        "control_hidden_states": torch.randn(1, 72, 2, 14, 18, generator=generator),
    }
    plain = pipe.transformer(**call)[0]
    dit_accel.enable(pipe, sla={**SLA, "topk": 1.0, "order": (2, 2, 4)})
    assert relative(pipe.transformer(**call)[0], plain) < 1e-5
    assert dit_accel.summary(pipe).sparse_calls == 5


def test_vace_pipeline_saves_and_loads(tmp_path):
    plain_vace().save_pretrained(tmp_path / "vace")
    pipe = dit_accel.SparseWanVACEPipeline.from_pretrained(
        tmp_path / "vace",
        text_encoder=None,
        tokenizer=None,
        sla={**SLA, "combine": "proj"},
        ras=RAS,
    )
    pipe.set_progress_bar_config(disable=True)
    randomise(pipe)
    latents = vace_call(pipe)()
    pipe.save_pretrained(tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["_class_name"] == "WanVACEPipeline"
    again = dit_accel.SparseWanVACEPipeline.from_pretrained(
        tmp_path / "again", text_encoder=None, tokenizer=None
    )
    again.set_progress_bar_config(disable=True)
    assert relative(vace_call(again)(), latents) < 1e-5
    dit_accel.save_sla(pipe, tmp_path / "sla")
    again.disable()
    dit_accel.load_sla(again, tmp_path / "sla")
    again.enable(ras=RAS)
    assert relative(vace_call(again)(), latents) < 1e-5
    with pytest.raises(ValueError, match="num_frames=10"):
        again("a cat", num_frames=10)


def test_fused_projections_and_unknown_processors_of_control_blocks():
    pipe = plain_vace()
    plain = vace_call(pipe)()
    pipe.transformer.fuse_qkv_projections()
    dit_accel.enable(pipe, sla={**SLA, "topk": 1.0}, ras={**RAS, "ratio": 1.0})
    assert relative(vace_call(pipe)(), plain) < 1e-5
    dit_accel.disable(pipe)

    class MyProcessor:
        pass

    pipe.transformer.vace_blocks[1].attn1.set_processor(MyProcessor())
    with pytest.raises(ValueError, match=r"vace_blocks\.1\.attn1: .*MyProcessor"):
        dit_accel.enable(pipe, sla="balanced")


# Image-to-video -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_first_and_last_frame(fused):
    """Two rows of image tokens for each sample, and a position embedding for them."""
    pipe = wan_i2v.make("unipc", pos_embed_seq_len=2 * wan_i2v.IMAGE_TOKENS)
    torch.nn.init.normal_(pipe.transformer.condition_embedder.image_embedder.pos_embed)
    if fused:
        pipe.transformer.fuse_qkv_projections()
    last = torch.rand(1, 3, 112, 144, generator=torch.Generator().manual_seed(8))
    call = wan_i2v.embeddings([0]) | wan_i2v.arguments([0], 2.0) | {"last_image": last}

    def latents():
        generator = torch.Generator().manual_seed(0)
        more = {"num_inference_steps": 7, "output_type": "latent", "generator": generator}
        return pipe(**call | more).frames

    check(pipe, latents, 7)


def test_cost_of_first_and_last_frame_is_what_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from ..ras.test_cost import PerCall

    pipe = wan_i2v.make("unipc", pos_embed_seq_len=2 * wan_i2v.IMAGE_TOKENS)
    pipe.set_progress_bar_config(disable=True)
    last = torch.rand(1, 3, 112, 144, generator=torch.Generator().manual_seed(8))
    call = wan_i2v.embeddings([0]) | wan_i2v.arguments([0], 1.0) | {"last_image": last}
    counter = PerCall(pipe.transformer)
    with sdpa_kernel(SDPBackend.MATH):
        pipe(**call, num_inference_steps=5, output_type="latent")
        plain = counter.counts[-1]
        family = family_of(pipe.transformer)
        text = wan_i2v.TEXT_TOKENS + 2 * wan_i2v.IMAGE_TOKENS
        whole = family.flops(pipe.transformer, 189, 189, text)
        assert whole + family.text_flops(pipe.transformer, text) == pytest.approx(plain, rel=0.01)
        counter.counts.clear()
        dit_accel.enable(pipe, ras=RAS)
        pipe(**call, num_inference_steps=5, output_type="latent")
    for step, count in zip(dit_accel.summary(pipe).ras.steps, counter.counts, strict=True):
        assert step.cost == pytest.approx(count / plain, rel=0.01)


def test_video_to_video_and_instructed_editing():
    from diffusers import LucyEditPipeline, WanTransformer3DModel, WanVideoToVideoPipeline

    source = make("wan22")
    parts = {"tokenizer": None, "text_encoder": None, "vae": source.vae}
    video = [np.random.default_rng(i).random((112, 144, 3)) for i in range(9)]
    call = wan22.embeddings([0]) | wan22.arguments([0], 2.0) | {"video": video}

    def calls(pipe, **changed):
        arguments = call | {"output_type": "latent"} | changed

        def latents():
            return pipe(**arguments, generator=torch.Generator().manual_seed(0)).frames

        return latents

    pipe = WanVideoToVideoPipeline(
        **parts, transformer=source.transformer, scheduler=source.scheduler
    )
    del call["num_frames"]
    check(pipe, calls(pipe, num_inference_steps=12, strength=0.6), 7)
    torch.manual_seed(2)
    config = dict(source.transformer.config) | {"in_channels": 8}
    pipe = LucyEditPipeline(
        **parts, transformer=WanTransformer3DModel.from_config(config), scheduler=source.scheduler
    )
    frames = {"video": [_picture(x) for x in video], "num_frames": 9}
    check(pipe, calls(pipe, num_inference_steps=7, **frames), 7)


def _picture(x):
    from PIL import Image

    return Image.fromarray((255 * x).astype(np.uint8))
