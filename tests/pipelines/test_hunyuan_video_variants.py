"""Pipelines of diffusers around `HunyuanVideoTransformer3DModel`, and what its family refuses."""

from functools import partial

import diffusers
import pytest
import torch

import dit_accel
from dit_accel.finetune.families import trainable_class
from dit_accel.runtime.install import method_of

from ..random_families.hunyuan_video import embeddings, make
from ..random_pipelines import randomise, relative, run
from .variants import RAS, SLA, check_variant, picture

SIZE = {"height": 112, "width": 144, "num_frames": 9}
CALL = {**embeddings([0]), **SIZE, "num_inference_steps": 5}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        (
            "HunyuanVideoImageToVideoPipeline",
            {"in_channels": 9, "out_channels": 4, "image_condition_type": "latent_concat"},
        ),
        ("HunyuanSkyreelsImageToVideoPipeline", {"in_channels": 8, "out_channels": 4}),
    ],
)
def test_image_to_video_conditions_in_further_channels(name, changed):
    cls = getattr(diffusers, name)
    if "Skyreels" not in name:
        cls = partial(cls, image_processor=None)
    negative = {f"negative_{k}": x for k, x in embeddings([-3]).items()}
    pipe = make(cls=cls, **changed)
    check_variant(pipe, **CALL, **negative, true_cfg_scale=2.0, image=picture(112, 144))


def test_the_first_frame_in_place_of_tokens_takes_forecasts_only():
    cls = partial(diffusers.HunyuanVideoImageToVideoPipeline, image_processor=None)
    pipe = make(cls=cls, image_condition_type="token_replace")
    for settings in ({"sla": SLA}, {"ras": {"ratio": 0.5, **RAS}}):
        with pytest.raises(ValueError, match="image_condition_type='token_replace'"):
            dit_accel.enable(pipe, **settings)
    dit_accel.enable(pipe, ras={"budget": 0.6, "warmup": 2, "tail": 1})
    pipe.set_progress_bar_config(disable=True)
    pipe(**CALL | {"num_inference_steps": 8}, image=picture(112, 144), output_type="latent")
    assert dit_accel.summary(pipe, strict=True).ras.ras_steps > 0


def test_a_model_without_embedded_guidance():
    check_variant(make(guidance_embeds=False), **CALL)


@pytest.mark.parametrize("order", ["raster", (2, 2, 4)], ids=["raster", "tiles"])
def test_dense_steps_and_layers_hide_padding_too(order):
    pipe = make()
    plain = run(pipe, "hunyuan_video", (4, 0), steps=3)
    dit_accel.enable(
        pipe, sla={**SLA, "topk": 1.0, "order": order, "dense_steps": 1, "dense_layers": [1]}
    )
    assert relative(run(pipe, "hunyuan_video", (4, 0), steps=3), plain) < 1e-5
    assert dit_accel.summary(pipe).dense_calls == {"dense step": 8 - 2, "dense layer": 6}


def test_lora():
    peft = pytest.importorskip("peft")
    pipe = make()
    targets = ["to_q", "add_k_proj", "to_add_out", "proj", "proj_out", "proj_mlp"]
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=targets)
    dit_accel.enable(pipe, sla={**SLA, "topk": 1.0}, ras={"ratio": 1.0, **RAS})
    torch.manual_seed(2)
    pipe.transformer.add_adapter(config)
    accelerated = run(pipe, "hunyuan_video", steps=4)
    dit_accel.disable(pipe)
    assert relative(accelerated, run(pipe, "hunyuan_video", steps=4)) < 1e-5


def test_trained_sparse_attention_is_saved_and_loaded(tmp_path):
    pipe = make()
    dit_accel.enable(pipe, sla={**SLA, "topk": 0.3, "combine": "proj"})
    randomise(pipe)
    expected = run(pipe, "hunyuan_video", steps=2)
    again = make()
    dit_accel.load_sla(again, dit_accel.save_sla(pipe, tmp_path))
    assert torch.equal(run(again, "hunyuan_video", steps=2), expected)


def test_a_repository_keeps_its_settings(tmp_path):
    pipe = dit_accel.SparseHunyuanVideoPipeline.from_pipe(
        make(), sla=SLA, ras={"ratio": 0.5, **RAS}
    )
    pipe.save_pretrained(tmp_path)
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    again = dit_accel.SparseHunyuanVideoPipeline.from_pretrained(tmp_path, **absent)
    for x in (pipe, again):
        x.set_progress_bar_config(disable=True)
    latents = [run(x, "hunyuan_video", steps=5) for x in (pipe, again)]
    assert torch.equal(*latents)
    assert again.summary(strict=True).ras.ras_steps > 0
    with pytest.raises(ValueError, match=r"num_frames=10: .*4k"):
        again(prompt="a cat", num_frames=10)
    with pytest.raises(ValueError, match=r"height=100: .*16"):
        again(prompt="a cat", height=100)


def test_estimated_memory_is_what_a_run_keeps():
    pipe = make()
    ras = {"ratio": 0.4, "kv_predictor": "hold", **RAS}
    dit_accel.enable(pipe, ras=ras)
    run(pipe, "hunyuan_video", steps=6)
    found = dit_accel.estimate_memory(pipe, **SIZE, ras=ras, num_inference_steps=6)
    assert method_of(pipe, "ras").kv_bytes == found.kv_bytes


def test_what_acceleration_cannot_follow_is_refused():
    pipe = make()
    with pytest.raises(ValueError, match=r"HunyuanVideoTransformer3DModel.*fine-tun"):
        trainable_class(pipe.transformer)
    pipe.transformer.transformer_blocks[1].attn.processor = object()
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.attn: .*object"):
        dit_accel.enable(pipe, sla=SLA)
