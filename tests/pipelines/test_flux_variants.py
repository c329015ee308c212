"""Pipelines of diffusers around `FluxTransformer2DModel`, and what its family refuses."""

from functools import partial

import diffusers
import pytest
import torch
from diffusers import FluxControlNetModel

import dit_accel
from dit_accel.runtime.install import installation_of, method_of

from ..random_families.flux import embeddings, make
from ..random_pipelines import liven, randomise, relative, run
from .variants import RAS, SLA, check_variant, mask, picture

SIZE = {"height": 176, "width": 208}
CALL = {**embeddings([0]), **SIZE, "num_inference_steps": 5}


def variant(name, **changed):
    return make(cls=getattr(diffusers, name), **changed)


@pytest.mark.parametrize("name", ["FluxImg2ImgPipeline", "FluxInpaintPipeline"])
def test_image_to_image(name):
    own = {"mask_image": mask(**SIZE)} if "Inpaint" in name else {}
    check_variant(variant(name), **CALL, **own, image=picture(**SIZE), strength=0.9)


def test_fill_conditions_in_further_channels():
    pipe = variant("FluxFillPipeline", in_channels=2 * 16 + 256, out_channels=16)
    check_variant(pipe, **CALL, image=picture(**SIZE), mask_image=mask(**SIZE))


@pytest.mark.parametrize("name", ["FluxControlPipeline", "FluxControlImg2ImgPipeline"])
def test_control_conditions_in_further_channels(name):
    pipe = variant(name, in_channels=32, out_channels=16)
    own = {"image": picture(**SIZE), "strength": 0.9} if "Img2Img" in name else {}
    check_variant(pipe, **CALL, **own, control_image=picture(**SIZE))


def test_residuals_of_a_controlnet_in_both_kinds_of_blocks():
    config = {**make().transformer.config, "num_layers": 1, "num_single_layers": 1}
    torch.manual_seed(1)
    controlnet = liven(FluxControlNetModel.from_config(config))
    pipe = make(cls=partial(diffusers.FluxControlNetPipeline, controlnet=controlnet))
    images = {"control_image": picture(**SIZE), "controlnet_conditioning_scale": 1.0}
    negative = {f"negative_{name}": x for name, x in embeddings([-3]).items()}
    check_variant(pipe, **CALL, **images, **negative, true_cfg_scale=2.0)


def kontext(**changed):
    own = {"image": picture(96, 128), "max_area": 176 * 208, "_auto_resize": False}
    return variant("FluxKontextPipeline"), {**CALL, **own, **changed}


def test_reference_images_run_in_every_call():
    """FLUX.1 Kontext: reference images follow the image and may have another size."""
    pipe, call = kontext()
    check_variant(pipe, **call)
    dit_accel.enable(pipe, sla={**SLA, "order": "raster", "topk": 1.0})
    pipe(**call, output_type="latent")
    assert dit_accel.summary(pipe, strict=True).overall_density == 1


def test_cost_counts_reference_images():
    costs = []
    for image in (None, picture(96, 128)):
        pipe, call = kontext(image=image)
        dit_accel.enable(pipe, ras={"ratio": 0.3, **RAS})
        pipe.set_progress_bar_config(disable=True)
        pipe(**call, output_type="latent")
        costs.append(dit_accel.summary(pipe).ras.steps[3].cost)
    assert 0.3 < costs[0] < costs[1] - 0.05


def test_the_schnell_model_has_no_embedded_guidance():
    pipe = make(guidance_embeds=False)
    check_variant(pipe, **CALL, guidance_scale=0.0)


def test_fused_projections_and_lora():
    peft = pytest.importorskip("peft")
    pipe = make()
    targets = ["to_add_out", "x_embedder", "proj_out", "context_embedder"]
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=targets)
    dit_accel.enable(pipe, sla={**SLA, "topk": 1.0}, ras={"ratio": 1.0, **RAS})
    torch.manual_seed(2)
    pipe.transformer.add_adapter(config)
    pipe.transformer.fuse_qkv_projections()
    accelerated = run(pipe, "flux", steps=4)
    dit_accel.disable(pipe)
    assert relative(accelerated, run(pipe, "flux", steps=4)) < 1e-5


def test_trained_sparse_attention_is_saved_and_loaded(tmp_path):
    pipe = make()
    dit_accel.enable(pipe, sla={**SLA, "topk": 0.3, "combine": "proj"})
    randomise(pipe)
    expected = run(pipe, "flux", steps=2)
    again = make()
    dit_accel.load_sla(again, dit_accel.save_sla(pipe, tmp_path))
    assert torch.equal(run(again, "flux", steps=2), expected)


def test_estimated_memory_is_what_a_run_keeps():
    pipe = make()
    ras = {"ratio": 0.4, "kv_predictor": "hold", **RAS}
    dit_accel.enable(pipe, ras=ras)
    run(pipe, "flux", steps=6)
    found = dit_accel.estimate_memory(pipe, **SIZE, ras=ras, num_inference_steps=6)
    assert method_of(pipe, "ras").kv_bytes == found.kv_bytes


def refused(pipe, match, **changed):
    with pytest.raises(ValueError, match=match):
        pipe(**CALL | changed, output_type="latent")


def test_what_acceleration_cannot_follow_is_refused():
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    dit_accel.enable(pipe, ras={"ratio": 0.5, **RAS})
    for name in ("ip_adapter_image_embeds", "attention_mask"):
        refused(pipe, name, joint_attention_kwargs={name: [torch.zeros(1)]})
    arguments = {"hidden_states": torch.zeros(1, 4, 16), "encoder_hidden_states": None}
    family = installation_of(pipe).family
    ids = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0]])
    with pytest.raises(ValueError, match=r"img_ids: 3 of 3 .* 2 of them"):
        family.call(pipe.transformer, {**arguments, "img_ids": ids})
    with pytest.raises(ValueError, match="img_ids: 2 of 3 "):
        family.call(
            pipe.transformer,
            {**arguments, "img_ids": torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0, 1]])},
        )
    ids = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]])
    residuals = {"controlnet_block_samples": [torch.zeros(1, 4, 32)]}
    with pytest.raises(ValueError, match=r"controlnet_block_samples: .* 2 tokens"):
        family.call(pipe.transformer, {**arguments, **residuals, "img_ids": ids})


def test_ip_adapter_processors_are_refused():
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    pipe = make()
    attn = pipe.transformer.transformer_blocks[1].attn
    attn.set_processor(FluxIPAdapterAttnProcessor(32, 24))
    with pytest.raises(ValueError, match=r"blocks\.1\.attn: .*FluxIPAdapterAttnProcessor"):
        dit_accel.enable(pipe, ras={"ratio": 0.5})


def test_loading_an_ip_adapter_after_enable_is_refused():
    pipe = make()
    dit_accel.enable(pipe, ras={"ratio": 0.5, **RAS})
    processors = dict(pipe.transformer.attn_processors)
    weights = {"image_proj": {}, "ip_adapter": {}}
    for i in range(len(pipe.transformer.transformer_blocks)):
        for name in ("to_k_ip", "to_v_ip"):
            weights["ip_adapter"] |= {
                f"{i}.{name}.weight": torch.zeros(32, 24),
                f"{i}.{name}.bias": torch.zeros(32),
            }
    with pytest.raises(ValueError, match="load_ip_adapter"):
        pipe.transformer._load_ip_adapter_weights(weights)
    assert pipe.transformer.attn_processors == processors
    run(pipe, "flux", steps=2)


def test_places_are_read_once_for_each_tensor(monkeypatch):
    """Position ids are read once, because reading them waits for a GPU."""
    from dit_accel.models import flux

    read = []

    def counted(ids):
        read.append(ids)
        return original(ids)

    original = flux._image_grid
    monkeypatch.setattr(flux, "_image_grid", counted)
    pipe = make()
    dit_accel.enable(pipe, ras={"ratio": 0.5, **RAS})
    run(pipe, "flux", steps=5)
    assert len(read) == 1
    ids = read[0]
    pipe.transformer.eval()
    run(pipe, "flux", steps=5)
    assert len(read) == 2
    assert read[1] is not ids
