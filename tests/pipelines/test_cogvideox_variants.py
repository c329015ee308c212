"""Pipelines of diffusers around `CogVideoXTransformer3DModel`, and what its family refuses."""

import diffusers
import pytest
import torch

import dit_accel
from dit_accel.finetune.families import trainable_class
from dit_accel.runtime.install import method_of

from ..random_families.cogvideox import embeddings, make
from ..random_pipelines import randomise, relative, run
from .variants import RAS, SLA, check_variant, picture

SIZE = {"height": 112, "width": 144, "num_frames": 9}
NEGATIVE = {f"negative_{k}": x for k, x in embeddings([-3]).items()}
CALL = {**embeddings([0]), **NEGATIVE, **SIZE, "num_inference_steps": 5, "guidance_scale": 2.0}
ONE_AND_A_HALF = {"patch_size_t": 2, "patch_bias": False}
"""Configuration of CogVideoX 1.5, which has tokens of two latent frames."""


@pytest.mark.parametrize(
    "changed",
    [{"use_learned_positional_embeddings": True}, ONE_AND_A_HALF],
    ids=["learned positions", "1.5"],
)
def test_text_to_video(changed):
    check_variant(make(**changed), **CALL)


@pytest.mark.parametrize(
    "changed", [{}, {**ONE_AND_A_HALF, "ofs_embed_dim": 8}], ids=["1.0", "1.5"]
)
def test_image_to_video(changed):
    pipe = make(cls=diffusers.CogVideoXImageToVideoPipeline, in_channels=8, **changed)
    check_variant(pipe, **CALL, image=picture(112, 144))


def test_video_to_video():
    pipe = make(cls=diffusers.CogVideoXVideoToVideoPipeline)
    call = {k: x for k, x in CALL.items() if k not in SIZE}
    video = [picture(112, 144)[0].permute(1, 2, 0).numpy()] * 9
    check_variant(pipe, **call, video=video, height=112, width=144, strength=1.0)


def test_fused_projections():
    pipe = make()
    pipe.fuse_qkv_projections()
    check_variant(pipe, **CALL)


def test_lora():
    peft = pytest.importorskip("peft")
    pipe = make()
    targets = ["to_q", "to_out.0", "proj", "text_proj", "proj_out"]
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=targets)
    dit_accel.enable(pipe, sla={**SLA, "topk": 1.0}, ras={"ratio": 1.0, **RAS})
    torch.manual_seed(2)
    pipe.transformer.add_adapter(config)
    accelerated = run(pipe, "cogvideox", steps=4)
    dit_accel.disable(pipe)
    assert relative(accelerated, run(pipe, "cogvideox", steps=4)) < 1e-5


def test_trained_sparse_attention_is_saved_and_loaded(tmp_path):
    pipe = make()
    dit_accel.enable(pipe, sla={**SLA, "topk": 0.3, "combine": "proj"})
    randomise(pipe)
    expected = run(pipe, "cogvideox", steps=2)
    again = make()
    dit_accel.load_sla(again, dit_accel.save_sla(pipe, tmp_path))
    assert torch.equal(run(again, "cogvideox", steps=2), expected)


def test_a_repository_keeps_its_settings(tmp_path):
    pipe = dit_accel.SparseCogVideoXPipeline.from_pipe(make(), sla=SLA, ras={"ratio": 0.5, **RAS})
    pipe.save_pretrained(tmp_path)
    absent = dict.fromkeys(("text_encoder", "tokenizer"))
    again = dit_accel.SparseCogVideoXPipeline.from_pretrained(tmp_path, **absent)
    for x in (pipe, again):
        x.set_progress_bar_config(disable=True)
    latents = [run(x, "cogvideox", steps=5) for x in (pipe, again)]
    assert torch.equal(*latents)
    assert again.summary(strict=True).ras.ras_steps > 0


@pytest.mark.parametrize("num_frames", [1, 8, 9, 16, 17])
def test_the_clip_has_the_frames_that_were_asked_for(num_frames):
    pipe = dit_accel.SparseCogVideoXPipeline.from_pipe(make(**ONE_AND_A_HALF), sla=None)
    pipe.set_progress_bar_config(disable=True)
    call = {**CALL, "height": 32, "width": 32, "num_frames": num_frames, "num_inference_steps": 1}
    clip = pipe(**call, output_type="pt").frames
    assert clip.shape == (1, num_frames, 3, 32, 32)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"num_frames": 10}, "num_frames=10: .*8k.*9 or 16"),
        ({"num_frames": 5}, "num_frames=5: .*8k.*1 or 8"),
        ({"num_frames": 0}, "num_frames=0: .*8k.*1 or 8"),
        ({"height": 104}, "height=104: .*16"),
    ],
    ids=str,
)
def test_sizes_that_diffusers_rounds_are_refused(size, message):
    pipe = dit_accel.SparseCogVideoXPipeline.from_pipe(make(), sla=None)
    with pytest.raises(ValueError, match=message):
        pipe(prompt="a cat", **size)


@pytest.mark.parametrize("changed", [{}, ONE_AND_A_HALF], ids=["1.0", "1.5"])
def test_estimated_memory_is_what_a_run_keeps(changed):
    pipe = make(**changed)
    ras = {"ratio": 0.4, "kv_predictor": "hold", **RAS}
    dit_accel.enable(pipe, ras=ras)
    run(pipe, "cogvideox", steps=6)
    found = dit_accel.estimate_memory(pipe, **SIZE, ras=ras, num_inference_steps=6)
    assert method_of(pipe, "ras").kv_bytes == found.kv_bytes


def test_its_dpm_scheduler_adds_noise_so_every_token_runs():
    pipe = make()
    pipe.scheduler = diffusers.CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    dit_accel.enable(pipe, ras={"ratio": 0.4, **RAS})
    with pytest.warns(UserWarning, match=r"noise.*CogVideoXDPMScheduler"):
        run(pipe, "cogvideox", steps=5)
    assert dit_accel.summary(pipe).ras.ras_steps == 0


def test_what_acceleration_cannot_follow_is_refused():
    pipe = make()
    with pytest.raises(ValueError, match=r"CogVideoXTransformer3DModel.*fine-tun"):
        trainable_class(pipe.transformer)
    dit_accel.enable(pipe, sla=SLA)
    mask = {"attention_mask": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"attention_kwargs\['attention_mask'\]: "):
        run(pipe, "cogvideox", steps=2, attention_kwargs=mask)
    dit_accel.disable(pipe)
    pipe.transformer.transformer_blocks[1].attn1.processor = object()
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.attn1: .*object"):
        dit_accel.enable(pipe, sla=SLA)
