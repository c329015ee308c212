"""Pipelines of diffusers around `QwenImageTransformer2DModel`, and what its family refuses."""

import sys
from functools import partial

import diffusers
import pytest
import torch
from diffusers import QwenImageControlNetModel
from PIL import Image

import dit_accel
from dit_accel.runtime.install import installation_of, method_of

from ..random_families.qwenimage import embeddings, make
from ..random_pipelines import liven, randomise, relative, run
from .variants import RAS, SLA, check_variant, mask, picture

SIZE = {"height": 176, "width": 208}
NEGATIVE = {f"negative_{name}": x for name, x in embeddings([-2]).items()}
CALL = {**embeddings([0]), **NEGATIVE, **SIZE, "num_inference_steps": 5, "true_cfg_scale": 2.0}


def variant(name, cls_options=None, **changed):
    cls = getattr(diffusers, name)
    return make(cls=partial(cls, **cls_options) if cls_options else cls, **changed)


@pytest.mark.parametrize("name", ["QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"])
def test_image_to_image(name):
    own = {"mask_image": mask(**SIZE)} if "Inpaint" in name else {}
    check_variant(variant(name), **CALL, **own, image=picture(**SIZE), strength=0.9)


def test_residuals_of_a_controlnet():
    config = {**make().transformer.config, "num_layers": 2}
    torch.manual_seed(1)
    controlnet = liven(QwenImageControlNetModel.from_config(config))
    pipe = variant("QwenImageControlNetPipeline", {"controlnet": controlnet})
    check_variant(pipe, **CALL, control_image=picture(**SIZE), controlnet_conditioning_scale=1.0)


@pytest.mark.parametrize(
    ("name", "zero_cond_t"),
    [("QwenImageEditPipeline", False), ("QwenImageEditPlusPipeline", True)],
)
def test_reference_images_run_in_every_call(name, zero_cond_t, monkeypatch):
    """Reference images follow the image and may have other sizes. Newer models modulate them as clean images."""
    pipe = variant(name, {"processor": None}, zero_cond_t=zero_cond_t)
    size = (128, 96) if "Plus" in name else (128, 96, None)
    monkeypatch.setattr(sys.modules[type(pipe).__module__], "calculate_dimensions", lambda *_: size)
    image = Image.new("RGB", (128, 96), (200, 30, 30))
    check_variant(pipe, **CALL, image=[image, image] if "Plus" in name else image)
    dit_accel.enable(pipe, sla={**SLA, "order": "raster", "topk": 1.0})
    pipe(**CALL, image=image, output_type="latent")
    assert dit_accel.summary(pipe, strict=True).overall_density == 1


def test_checkpointed_blocks_have_the_same_gradients():
    """Blocks run again after the call, when its tokens are not known any more."""
    transformer = make(zero_cond_t=True).transformer
    dit_accel.enable(transformer, sla={**SLA, "topk": 0.5, "combine": "proj"})
    call = {
        "hidden_states": torch.randn(1, 48 + 24, 16),
        "encoder_hidden_states": embeddings([0])["prompt_embeds"],
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 6, 8), (1, 4, 6)]],
        "return_dict": False,
    }
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            transformer.enable_gradient_checkpointing()
        transformer.zero_grad()
        transformer(**call)[0].square().mean().backward()
        gradients.append(transformer.transformer_blocks[0].img_mod[1].weight.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


@torch.no_grad()
def test_images_of_layers_are_a_grid_with_a_layer_axis():
    """Qwen-Image-Layered: each layer has a shape, and one reference follows."""
    transformer = make(use_layer3d_rope=True, use_additional_t_cond=True).transformer
    shapes = [(1, 6, 8)] * 3 + [(1, 4, 6)]
    call = {
        "hidden_states": torch.randn(1, 3 * 48 + 24, 16),
        "encoder_hidden_states": embeddings([0])["prompt_embeds"],
        "timestep": torch.tensor([0.5]),
        "img_shapes": [shapes],
        "additional_t_cond": torch.tensor([0]),
        "return_dict": False,
    }
    plain = transformer(**call)[0]
    dit_accel.enable(transformer, sla={**SLA, "topk": 1.0, "order": (2, 2, 4)})
    sparse = transformer(**call)[0]
    assert sparse.shape[1] == 3 * 48
    assert relative(sparse, plain[:, : 3 * 48]) < 1e-5
    assert dit_accel.summary(transformer, strict=True).overall_density == 1
    shapes[1] = (1, 8, 6)
    with pytest.raises(ValueError, match=r"img_shapes=.*layers"):
        transformer(**call)


def test_padded_text_is_hidden_in_whole_and_partial_steps():
    pipe = make()
    batch = {**CALL, **{f"negative_{k}": x for k, x in embeddings([-3, -3]).items()}}

    def run_padded(noise):
        call = embeddings([0, 1])
        call["prompt_embeds"][1, 9:] += noise
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        return pipe(**{**batch, **call}, generator=generators, output_type="latent").images

    pipe.set_progress_bar_config(disable=True)
    plain = run_padded(0.0)
    dit_accel.enable(pipe, ras={"ratio": 1.0, **RAS}, sla={**SLA, "topk": 1.0})
    assert relative(run_padded(0.0), plain) < 1e-5
    dit_accel.enable(pipe, ras={"ratio": 0.4, **RAS}, sla={**SLA, "topk": 0.3})
    result = run_padded(0.0)
    report = dit_accel.summary(pipe, strict=True)
    assert report.ras.ras_steps > 0
    assert not report.dense_calls
    torch.testing.assert_close(run_padded(3.0), result, rtol=0, atol=0)
    assert relative(result, plain) > 1e-5


@torch.no_grad()
def test_a_mask_that_hides_nothing_is_left_out():
    """Pipelines of diffusers omit a mask without padding; otherwise each layer would run dense."""
    transformer = make().transformer
    call = {
        "hidden_states": torch.randn(1, 48, 16),
        "encoder_hidden_states": embeddings([0])["prompt_embeds"],
        "encoder_hidden_states_mask": torch.ones(1, 12),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 6, 8)]],
        "return_dict": False,
    }
    plain = transformer(**call)[0]
    dit_accel.enable(transformer, sla={**SLA, "topk": 1.0})
    assert relative(transformer(**call)[0], plain) < 1e-5
    assert not dit_accel.summary(transformer, strict=True).dense_calls


def test_what_acceleration_cannot_follow_is_refused():
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    dit_accel.enable(pipe, ras={"ratio": 0.5, **RAS})
    family = installation_of(pipe).family
    call = {
        "hidden_states": torch.zeros(1, 6, 16),
        "encoder_hidden_states": torch.zeros(1, 3, 24),
        "img_shapes": [[(1, 2, 2), (1, 1, 2)]],
    }
    assert family.call(pipe.transformer, call).references == 2
    for hidden, match in (([1, 0, 1], "padding"), ([1, 1, 0], "2 tokens")):
        with pytest.raises(ValueError, match=f"encoder_hidden_states_mask: .*{match}"):
            family.call(
                pipe.transformer, {**call, "encoder_hidden_states_mask": torch.tensor([hidden])}
            )
    with pytest.raises(ValueError, match=r"controlnet_block_samples: .* 2 tokens"):
        family.call(pipe.transformer, {**call, "controlnet_block_samples": [torch.zeros(1, 6, 32)]})


def test_lora():
    peft = pytest.importorskip("peft")
    pipe = make()
    targets = ["to_q", "to_add_out", "img_in", "proj_out", "txt_in"]
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=targets)
    dit_accel.enable(pipe, sla={**SLA, "topk": 1.0}, ras={"ratio": 1.0, **RAS})
    torch.manual_seed(2)
    pipe.transformer.add_adapter(config)
    accelerated = run(pipe, "qwenimage", steps=4)
    dit_accel.disable(pipe)
    assert relative(accelerated, run(pipe, "qwenimage", steps=4)) < 1e-5


def test_trained_sparse_attention_is_saved_and_loaded(tmp_path):
    pipe = make()
    dit_accel.enable(pipe, sla={**SLA, "topk": 0.3, "combine": "proj"})
    randomise(pipe)
    expected = run(pipe, "qwenimage", steps=2)
    again = make()
    dit_accel.load_sla(again, dit_accel.save_sla(pipe, tmp_path))
    assert torch.equal(run(again, "qwenimage", steps=2), expected)


def test_estimated_memory_is_what_a_run_keeps():
    pipe = make()
    ras = {"ratio": 0.4, "kv_predictor": "hold", **RAS}
    dit_accel.enable(pipe, ras=ras)
    run(pipe, "qwenimage", steps=6)
    found = dit_accel.estimate_memory(pipe, **SIZE, ras=ras, num_inference_steps=6)
    assert method_of(pipe, "ras").kv_bytes == found.kv_bytes
