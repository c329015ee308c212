"""Pipelines of diffusers around `LTXVideoTransformer3DModel`, and what its family refuses."""

import diffusers
import pytest
import torch
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

import dit_accel
from dit_accel.finetune.families import trainable_class
from dit_accel.runtime.install import installation_of, method_of

from ..random_families.ltx import embeddings, make
from ..random_pipelines import randomise, relative, run
from .variants import RAS, SLA, check_variant, picture

SIZE = {"height": 224, "width": 288, "num_frames": 17}
NEGATIVE = {f"negative_{k}": x for k, x in embeddings([-3]).items()}
CALL = {**embeddings([0]), **NEGATIVE, **SIZE, "num_inference_steps": 5}


def test_image_to_video_has_a_timestep_for_each_token():
    pipe = make(cls=diffusers.LTXImageToVideoPipeline)
    check_variant(pipe, **CALL, image=picture(224, 288))


@pytest.mark.parametrize("frame", [None, 0, 8], ids=["none", "first", "further"])
def test_conditions_are_tokens_of_the_video_or_frames_before_it(frame):
    pipe = make(cls=diffusers.LTXConditionPipeline)
    conditions = None
    if frame is not None:
        conditions = [LTXVideoCondition(image=picture(224, 288), frame_index=frame, strength=0.9)]
    check_variant(pipe, **CALL, conditions=conditions)
    grid = installation_grid(pipe, conditions)
    assert grid == (4 if frame == 8 else 3, 7, 9)


def installation_grid(pipe, conditions):
    dit_accel.enable(pipe, ras={"ratio": 0.4, **RAS})
    pipe(**CALL, conditions=conditions, output_type="latent")
    return method_of(pipe, "ras").plan.key[1]


def test_a_video_as_condition():
    pipe = make(cls=diffusers.LTXConditionPipeline)
    video = torch.rand(9, 3, 224, 288, generator=torch.Generator().manual_seed(3))
    check_variant(pipe, **CALL, video=list(video), frame_index=0, strength=1.0)


def test_windows_of_a_long_video(monkeypatch):
    """Each window is a run with its own positions and timesteps."""
    pipe = make(cls=diffusers.LTXI2VLongMultiPromptPipeline)

    def encode(prompt, **rest):
        text = embeddings([len(prompt[0])])
        return text["prompt_embeds"], text["prompt_attention_mask"], None, None

    monkeypatch.setattr(pipe, "encode_prompt", encode)
    size = {"height": 224, "width": 288, "num_frames": 33}
    windows = {"temporal_tile_size": 24, "temporal_overlap": 8, "cond_image": picture(224, 288)[0]}
    check_variant(pipe, prompt="a|bc", num_inference_steps=6, **size, **windows)


def test_fused_projections_and_lora():
    peft = pytest.importorskip("peft")
    pipe = make()
    targets = ["to_q", "to_k", "proj_in", "proj_out", "caption_projection.linear_1"]
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=targets)
    dit_accel.enable(pipe, sla={**SLA, "topk": 1.0}, ras={"ratio": 1.0, **RAS})
    torch.manual_seed(2)
    pipe.transformer.fuse_qkv_projections()
    pipe.transformer.add_adapter(config)
    accelerated = run(pipe, "ltx", steps=4)
    dit_accel.disable(pipe)
    assert relative(accelerated, run(pipe, "ltx", steps=4)) < 1e-5


def test_trained_sparse_attention_is_saved_and_loaded(tmp_path):
    pipe = make()
    dit_accel.enable(pipe, sla={**SLA, "topk": 0.3, "combine": "proj"})
    randomise(pipe)
    expected = run(pipe, "ltx", steps=2)
    again = make()
    dit_accel.load_sla(again, dit_accel.save_sla(pipe, tmp_path))
    assert torch.equal(run(again, "ltx", steps=2), expected)


def test_a_repository_keeps_its_settings(tmp_path):
    pipe = dit_accel.SparseLTXPipeline.from_pipe(make(), sla=SLA, ras={"ratio": 0.5, **RAS})
    pipe.save_pretrained(tmp_path)
    absent = {"text_encoder": None, "tokenizer": None}
    again = dit_accel.SparseLTXPipeline.from_pretrained(tmp_path, **absent)
    for x in (pipe, again):
        x.set_progress_bar_config(disable=True)
    latents = [run(x, "ltx", steps=5) for x in (pipe, again)]
    assert torch.equal(*latents)
    assert again.summary(strict=True).ras.ras_steps > 0
    with pytest.raises(ValueError, match=r"num_frames=10: .*8k"):
        again(prompt="a cat", num_frames=10)
    with pytest.raises(ValueError, match=r"height=112: .*32"):
        again(prompt="a cat", height=112)


def test_estimated_memory_is_what_a_run_keeps():
    pipe = make()
    ras = {"ratio": 0.4, "kv_predictor": "hold", **RAS}
    dit_accel.enable(pipe, ras=ras)
    run(pipe, "ltx", steps=6)
    found = dit_accel.estimate_memory(pipe, **SIZE, ras=ras, num_inference_steps=6)
    assert method_of(pipe, "ras").kv_bytes == found.kv_bytes


def test_what_acceleration_cannot_follow_is_refused():
    pipe = make()
    with pytest.raises(ValueError, match=r"LTXVideoTransformer3DModel.*fine-tun"):
        trainable_class(pipe.transformer)
    dit_accel.enable(pipe, sla=SLA)
    arguments = {"hidden_states": torch.zeros(1, 7, 8), "num_frames": 1, "height": 2, "width": 3}
    with pytest.raises(ValueError, match=r"hidden_states: 7 tokens.*1 frames of 2 x 3"):
        installation_of(pipe).family.call(pipe.transformer, arguments)
    dit_accel.disable(pipe)
    pipe.transformer.transformer_blocks[1].attn1.processor = object()
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.attn1: .*object"):
        dit_accel.enable(pipe, sla=SLA)
