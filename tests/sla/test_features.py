"""Features of pipelines with sparse attention: each works or is refused with an error."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_map_only

import dit_accel
from dit_accel.runtime.install import method_of

from ..offloading import copying_stream, group_offload
from ..random_pipelines import FAMILIES, make, randomise, relative, run

every_family = pytest.mark.parametrize("family", FAMILIES)
both_families = pytest.mark.parametrize("family", ["wan", "sd3"])
TILE = (1, 4, 4)
every_order = pytest.mark.parametrize("order", ["raster", TILE], ids=["raster", "tiles"])
CPU = torch.device("cpu")


def sla(**changed):
    """Return settings that are sparse in every step and layer."""
    base = {"topk": 0.3, "block_q": 16, "block_k": 16, "order": TILE, "crossover": "never"}
    return {**base, "dense_steps": 0, "dense_layers": 0, **changed}


def enable(pipe, **changed):
    """Return weights as if they were trained, except for "alpha", which measures its own."""
    dit_accel.enable(pipe, sla=sla(**changed))
    if changed.get("combine") == "proj":
        randomise(pipe)


def modules(pipe):
    return method_of(pipe, "sla").attention


def sparse_calls(pipe):
    """Return sparse calls by layer, and check that there are no dense ones."""
    report = dit_accel.summary(pipe, strict=True)
    assert not report.dense_calls
    return [layer.sparse_calls for layer in report.layers]


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def last_call(pipe, family):
    """Return the arguments of a transformer call."""
    seen = {}
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    run(pipe, family, steps=1)
    hook.remove()
    return seen


# Other weights ------------------------------------------------------------------------------------


def add_lora(pipe, targets):
    from peft import LoraConfig

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    pipe.transformer.add_adapter(config)


@pytest.mark.parametrize(
    ("family", "combine", "targets"),
    [
        ("wan", "proj", "all-linear"),
        ("sd3", "proj", "all-linear"),
        ("lumina2", "proj", "all-linear"),
        ("wan", "shared_softmax", ["to_q", "to_k", "to_v", "patch_embedding", "proj_out"]),
    ],
    ids=["wan", "sd3", "lumina2", "wan-ends"],
)
@pytest.mark.combines("sla", "LoRA")
def test_lora_loaded_and_fused_before_or_after_enable(family, combine, targets):
    everything = sla(topk=1.0, combine=combine)  # with weights of zero, as plain
    pipe = make(family)
    add_lora(pipe, targets)
    plain = run(pipe, family, steps=2)
    dit_accel.enable(pipe, sla=everything)
    assert relative(run(pipe, family, steps=2), plain) < 1e-5
    dit_accel.disable(pipe)
    same(run(pipe, family, steps=2), plain)
    pipe = make(family)
    dit_accel.enable(pipe, sla=everything)
    assert relative(run(pipe, family, steps=2), plain) > 1e-3
    add_lora(pipe, targets)
    assert relative(run(pipe, family, steps=2), plain) < 1e-5
    pipe.transformer.fuse_lora()
    assert relative(run(pipe, family, steps=2), plain) < 1e-5
    assert dit_accel.summary(pipe, strict=True).density == 1
    dit_accel.disable(pipe)
    assert relative(run(pipe, family, steps=2), plain) < 1e-5


@both_families
@pytest.mark.combines("sla and ras", "LoRA")
def test_region_adaptive_sampling_follows_lora_too(family):
    latents = []
    for enable_first in (True, False):
        pipe = make(family)
        for lora in (not enable_first, enable_first):
            if lora:
                add_lora(pipe, "all-linear")
            else:
                ras = {"ratio": 0.4, "warmup": 1, "tail": 1, "resets": []}
                dit_accel.enable(pipe, sla=sla(), ras=ras)
        latents.append(run(pipe, family, steps=5))
        assert dit_accel.summary(pipe, strict=True).ras.ras_steps == 3
    same(*latents)


@pytest.mark.parametrize("family", ["wan", "sd3", "sd35"])
@pytest.mark.combines("sla", "fused QKV")
def test_fused_projections(family):
    pipe = make(family)
    plain = run(pipe, family, steps=2)
    pipe.transformer.fuse_qkv_projections()
    enable(pipe, topk=1.0)
    assert relative(run(pipe, family, steps=2), plain) < 1e-5
    assert dit_accel.summary(pipe, strict=True).density == 1
    pipe = make(family)
    enable(pipe, topk=1.0)
    pipe.transformer.fuse_qkv_projections()
    if family == "wan":
        assert relative(run(pipe, family, steps=2), plain) < 1e-5
    else:  # it replaces the processors
        with pytest.raises(RuntimeError, match=r"attn.*changed"):
            run(pipe, family, steps=2)


@both_families
@pytest.mark.combines("sla", "layerwise casting")
def test_storage_in_8_bits_leaves_the_weights_of_sparse_attention_alone(family):
    latents = []
    for enable_first in (True, False):
        pipe = make(family).to(torch.bfloat16)
        if enable_first:
            enable(pipe, combine="proj")
        pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
        if not enable_first:
            enable(pipe, combine="proj")
        latents.append(run(pipe, family, steps=2))
        assert {x.dtype for m in modules(pipe).values() for x in m.parameters()} == {torch.float32}
    same(*latents)


# Offloading ---------------------------------------------------------------------------------------


def offload(pipe, how):
    from accelerate import cpu_offload, cpu_offload_with_hook

    if how == "model":
        cpu_offload_with_hook(pipe.transformer, execution_device=CPU)
    elif how == "sequential":
        for module in (pipe.transformer, pipe.vae):
            cpu_offload(module, execution_device=CPU)
    else:
        group = {"offload_type": how, "num_blocks_per_group": 1}
        pipe.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, **group)


@pytest.mark.parametrize("how", ["model", "sequential", "block_level", "leaf_level"])
@pytest.mark.parametrize(
    ("family", "combine", "order"),
    [
        ("wan", "proj", TILE),
        ("wan", "alpha", "raster"),
        ("sd3", "shared_softmax", TILE),
    ],
    ids=lambda x: x if isinstance(x, str) else "tiles",
)
@pytest.mark.combines("sla", "model offload", "group offload")
def test_offloading_before_or_after_enable(family, how, combine, order):
    pipe = make(family)
    plain = run(pipe, family, steps=1)
    enable(pipe, combine=combine, order=order)
    expected = run(pipe, family, steps=1)
    assert relative(expected, plain) > 1e-4
    for enable_first in (True, False):
        pipe = make(family)
        if enable_first:
            enable(pipe, combine=combine, order=order)
        offload(pipe, how)
        if not enable_first:
            enable(pipe, combine=combine, order=order)
        for _ in range(2):
            same(run(pipe, family, steps=1), expected)
        assert sum(sparse_calls(pipe)) > 0
        dit_accel.disable(pipe)
        same(run(pipe, family, steps=1), plain)


@pytest.fixture
def offload_with_streams(monkeypatch):
    stream = copying_stream(monkeypatch)
    return lambda transformer, how: group_offload(transformer, stream, how=how)


@pytest.mark.parametrize("how", ["block_level", "leaf_level"])
@pytest.mark.parametrize("combine", ["proj", "alpha"])
@pytest.mark.combines("sla", "group offload")
def test_group_offloading_with_streams_before_and_after_enable(offload_with_streams, how, combine):
    pipe = make("wan")
    plain = run(pipe, "wan", steps=2)
    enable(pipe, combine=combine, dense_steps=1)
    expected = run(pipe, "wan", steps=2)
    offloaded = make("wan")
    enable(offloaded, combine=combine, dense_steps=1)
    offload_with_streams(offloaded.transformer, how)
    for _ in range(2):
        same(run(offloaded, "wan", steps=2), expected)
    dit_accel.disable(offloaded)
    same(run(offloaded, "wan", steps=2), plain)
    enable(offloaded, combine=combine, dense_steps=1)
    for _ in range(2):
        same(run(offloaded, "wan", steps=2), expected)


def test_a_share_that_offloading_to_a_disk_would_lose_is_an_error(tmp_path):
    from accelerate import cpu_offload, disk_offload

    def fresh():
        pipe = make("wan")
        enable(pipe, combine="alpha")
        return pipe

    def on_disk(pipe, folder):
        disk_offload(pipe.transformer, str(tmp_path / folder), execution_device=CPU)
        cpu_offload(pipe.vae, execution_device=CPU)

    pipe = fresh()
    expected = run(pipe, "wan", steps=1)
    on_disk(pipe, "measured")
    same(run(pipe, "wan", steps=1), expected)
    pipe = fresh()
    on_disk(pipe, "not-measured")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"combine='alpha': .*offload"):
            run(pipe, "wan", steps=1)


# Step caches --------------------------------------------------------------------------------------


def cache_config(name, pipe):
    import diffusers
    from diffusers.hooks.mag_cache import MagCacheConfig

    skip = {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (-1, 950),
        "current_timestep_callback": lambda: int(pipe._current_timestep),
    }
    if name == "first-block":
        return diffusers.FirstBlockCacheConfig(threshold=0.3)
    if name == "pyramid":
        return diffusers.PyramidAttentionBroadcastConfig(**skip)
    if name == "faster":
        return diffusers.FasterCacheConfig(
            spatial_attention_block_identifiers=(r"blocks.*attn1",),
            attention_weight_callback=lambda _: 0.3,
            is_guidance_distilled=True,  # guidance halves come in calls of their own
            tensor_format="BCFHW",
            **skip,
        )
    if name == "magnitude":
        return MagCacheConfig(threshold=0.5, num_inference_steps=6, mag_ratios=[1.0] + [0.98] * 5)
    if name == "taylor":
        return diffusers.TaylorSeerCacheConfig(
            cache_interval=2,
            disable_cache_before_step=2,
            cache_identifiers=[r"blocks\.\d+\.attn1"],
            taylor_factors_dtype=torch.float32,
        )
    return diffusers.SeaCacheConfig(threshold=10.0)


@pytest.mark.parametrize("name", ["first-block", "pyramid", "faster", "magnitude", "taylor", "sea"])
@pytest.mark.combines("sla", "step caches")
def test_step_caches_are_as_beside_the_plain_pipeline(name):
    pipe = make("wan")
    pipe.transformer.enable_cache(cache_config(name, pipe))
    ran = [0] * 3
    for i, block in enumerate(pipe.transformer.blocks):

        def count(*_, i=i):
            ran[i] += 1

        block.attn1.to_out[0].register_forward_hook(count)
    cached = run(pipe, "wan", steps=6)
    assert 0 < sum(ran) < 36  # of 3 layers, 6 steps and 2 halves of guidance
    others = [("raster", False), (TILE, True)] if name == "first-block" else []
    for order, enable_first in [("raster", True), (TILE, False), *others]:
        pipe = make("wan")
        if enable_first:
            enable(pipe, topk=1.0, order=order)
        pipe.transformer.enable_cache(cache_config(name, pipe))
        if not enable_first:
            enable(pipe, topk=1.0, order=order)
        assert relative(run(pipe, "wan", steps=6), cached) < 1e-5
        assert sparse_calls(pipe) == ran
    pipe.transformer.disable_cache()
    run(pipe, "wan", steps=1)
    assert sparse_calls(pipe) == [2] * 3


# Precision and gradients --------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_pipelines(family, dtype):
    pipe = make(family).to(dtype)
    plain = run(pipe, family, steps=1)
    dit_accel.enable(pipe, sla=sla(topk=1.0, combine="proj"))  # with weights of zero, as plain
    latents = run(pipe, family, steps=1)
    assert latents.dtype == plain.dtype
    assert relative(latents.float(), plain.float()) < 2e-2
    assert {x.dtype for m in modules(pipe).values() for x in m.parameters()} == {torch.float32}


@both_families
def test_autocast(family):
    pipe = make(family)
    for combine in ("shared_softmax", "proj", "alpha"):
        enable(pipe, combine=combine)
        full = run(pipe, family, steps=2)
        with torch.autocast("cpu", torch.bfloat16):
            latents = run(pipe, family, steps=2)
        assert 0 < relative(latents, full) < 2e-2
        assert sum(sparse_calls(pipe)) > 0
        dit_accel.disable(pipe)


@pytest.mark.parametrize("family", ["wan", "sd3", "lumina2"])
def test_checkpointed_gradients_equal_those_without(family):
    pipe = make(family)
    enable(pipe, combine="proj")
    call = last_call(pipe, family)
    transformer = pipe.transformer.train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            transformer.enable_gradient_checkpointing()
        transformer.zero_grad()
        transformer(*call["args"], **call["kwargs"])[0].float().square().mean().backward()
        gradients.append({n: x.grad for n, x in transformer.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-8)
    assert all(gradients[0][f"{name}.sla.proj_l.weight"] is not None for name in modules(pipe))


@both_families
def test_gradients_after_inference_mode(family):
    """Tensors that are cached in inference mode can be used in calls with gradients."""
    pipe = make(family)
    enable(pipe, combine="proj", order=(2, 2, 4))
    with torch.inference_mode():
        call = last_call(pipe, family)
    call = tree_map_only(torch.Tensor, torch.clone, call)
    pipe.transformer(*call["args"], **call["kwargs"])[0].square().mean().backward()
    assert all(m.proj_l.weight.grad is not None for m in modules(pipe).values())
    assert sparse_calls(pipe) == [1] * 3  # outside of the loop, counted anew


# Other calls of the same transformer --------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False], ids=["by-name", "by-position"])
@every_order
@pytest.mark.combines("sla", "ControlNet")
def test_controlnet_residuals_follow_the_order_of_tokens(order, named):
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    residuals = [
        0.3 * torch.randn(2, 143, 32, generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    ]

    def add(module, args, kwargs):
        if named:
            return args, {**kwargs, "block_controlnet_hidden_states": list(residuals)}
        return (*(kwargs.pop(name) for name in names), list(residuals)), kwargs

    pipe = make("sd3")
    without = run(pipe, "sd3", steps=4)
    pipe.transformer.register_forward_pre_hook(add, with_kwargs=True)
    plain = run(pipe, "sd3", steps=4)
    assert relative(plain, without) > 0.1
    enable(pipe, topk=1.0, order=order)
    assert relative(run(pipe, "sd3", steps=4), plain) < 1e-5
    dit_accel.enable(pipe, ras={"ratio": 0.5, "warmup": 1, "tail": 1, "resets": []})
    assert relative(run(pipe, "sd3", steps=4), plain) < 0.1
    assert dit_accel.summary(pipe, strict=True).ras.ras_steps == 2


def test_skipped_layers_are_not_counted():
    guidance = {
        "skip_guidance_layers": [1],
        "skip_layer_guidance_start": 0.05,
        "skip_layer_guidance_stop": 0.8,
    }
    pipe = make("sd35")
    plain = run(pipe, "sd35", (0, 1), **guidance)
    enable(pipe, topk=1.0)
    assert relative(run(pipe, "sd35", (0, 1), **guidance), plain) < 1e-5
    counts = {x.name.split(".")[1]: x.sparse_calls for x in dit_accel.summary(pipe).layers}
    assert counts == {"0": 17, "1": 10, "2": 17}  # 10 steps, 7 of them with a third call


@every_order
@pytest.mark.combines("sla", "image to image")
def test_img2img_counts_dense_steps_from_where_it_begins(order):
    from diffusers import StableDiffusion3Img2ImgPipeline

    pipe = StableDiffusion3Img2ImgPipeline(**make("sd3").components)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 176, 208, generator=torch.Generator().manual_seed(0))
    call = {"steps": 10, "image": image, "strength": 0.6}
    plain = run(pipe, "sd3", **call)
    enable(pipe, topk=1.0, order=order, dense_steps=0.25, dense_layers=1)
    assert relative(run(pipe, "sd3", **call), plain) < 1e-5
    first, *others = dit_accel.summary(pipe, strict=True).layers
    assert first.dense_calls == {"dense layer": 6}  # 60 % of 10 steps
    assert all((x.sparse_calls, x.dense_calls) == (4, {"dense step": 2}) for x in others)


def test_pipelines_that_share_a_transformer_share_its_sparse_attention():
    from diffusers import StableDiffusion3Img2ImgPipeline

    first = make("sd3")
    plain = run(first, "sd3", steps=3)
    enable(first)
    expected = run(first, "sd3", steps=3)
    second = type(first).from_pipe(first)
    other = StableDiffusion3Img2ImgPipeline.from_pipe(first)
    for pipe in (second, other):
        pipe.set_progress_bar_config(disable=True)
        assert pipe.transformer is first.transformer
    same(run(second, "sd3", steps=3), expected)
    assert sparse_calls(first) == sparse_calls(second) == [3] * 3
    run(other, "sd3", steps=4, image=torch.rand(1, 3, 176, 208), strength=0.5)
    assert sparse_calls(first) == [2] * 3
    dit_accel.disable(other)
    same(run(first, "sd3", steps=3), plain)


# Enabling -----------------------------------------------------------------------------------------


@both_families
def test_a_second_method_keeps_the_weights_of_the_first(family):
    pipe = make(family)
    enable(pipe, combine="proj")
    expected = run(pipe, family, steps=4)
    ras = {"ratio": 1.0, "warmup": 1, "tail": 1, "resets": [], "kv_predictor": "hold"}
    dit_accel.enable(pipe, ras=ras)
    assert relative(run(pipe, family, steps=4), expected) < 2e-6
    dit_accel.enable(pipe, sla=sla(combine="proj"), ras=ras)
    assert relative(run(pipe, family, steps=4), expected) < 2e-6


@pytest.mark.refuses("sla", "IP-Adapter", because="its processors are unknown")
def test_ip_adapters_are_refused_by_name():
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0

    pipe = make("sd3")
    block = pipe.transformer.transformer_blocks[1]
    stock = block.attn.processor
    block.attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(32, 32, 16, timesteps_emb_dim=32))
    with pytest.raises(ValueError, match=r"blocks\.1\.attn: .*SD3IPAdapterJoint"):
        enable(pipe)
    block.attn.set_processor(stock)
    enable(pipe)
    image = {"ip_adapter_image_embeds": torch.zeros(1)}
    with pytest.raises(ValueError, match="ip_adapter_image_embeds: "):
        run(pipe, "sd3", joint_attention_kwargs=image)


@both_families
def test_tensor_parallelism_is_refused_before_and_after_enable(family):
    def switch_on(pipe):
        pipe.transformer._parallel_config = SimpleNamespace(tensor_parallel_config=object())

    pipe = make(family)
    switch_on(pipe)
    with pytest.raises(ValueError, match="tensor parallelism"):
        enable(pipe)
    pipe = make(family)
    enable(pipe)
    switch_on(pipe)
    with pytest.raises(RuntimeError, match="tensor parallelism"):
        run(pipe, family)
