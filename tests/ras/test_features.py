"""Features of pipelines with region-adaptive sampling: each works or is refused with an error."""

import json
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dit_accel
from dit_accel import RASConfig
from dit_accel.ras import memory
from dit_accel.runtime.install import installation_of, method_of

from ..random_pipelines import FAMILIES, embeddings, make, relative, run
from ..runtime.own_loops import Conditions

every_family = pytest.mark.parametrize("family", FAMILIES)
SPARSE = {"ratio": 0.3, "warmup": 2, "tail": 1, "resets": (6,)}


def engine(pipe):
    return method_of(pipe, "ras")


def ras_steps(pipe):
    return dit_accel.summary(pipe, strict=True).ras.ras_steps


# Contexts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["wan", "lumina2"])
def test_the_order_of_contexts_is_irrelevant(family):
    """Results of separate guidance halves do not depend on the order of the calls."""

    def denoise(order):
        pipe = make(family, "unipc")
        dit_accel.enable(pipe, ras={**SPARSE, "selection": "std", "kv_predictor": "linear"})
        halves = [Conditions(family, i) for i in (0, 1)]
        latents = halves[0].latents
        pipe.scheduler.set_timesteps(10)
        with torch.no_grad():
            for t in pipe.scheduler.timesteps:
                outputs = {
                    i: halves[i].velocity(pipe.transformer, latents, t.expand(1)) for i in order
                }
                guided = outputs[0] + 2 * (outputs[1] - outputs[0])
                latents = pipe.scheduler.step(guided, t, latents, return_dict=False)[0]
        assert ras_steps(pipe) == 6
        return latents

    torch.testing.assert_close(denoise([0, 1]), denoise([1, 0]), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["sd3", "lumina"])
def test_the_order_of_halves_in_a_batch_is_irrelevant(family):
    """Both halves of a batch get the index set of their sample, and rows do not mix."""
    pipe = make(family)
    dit_accel.enable(pipe, ras={**SPARSE, "selection": "std"})
    pipe._guidance_scale = 2.0
    outputs = {}
    for order in ([0, 1], [1, 0]):
        conditions = Conditions(family, order)
        pipe.scheduler.set_timesteps(10)
        latents = conditions.latents[:1]
        kept = []
        with torch.no_grad():
            for t in pipe.scheduler.timesteps:
                both = torch.cat([latents] * 2)
                out = conditions.velocity(pipe.transformer, both, t.expand(2))
                rows = dict(zip(order, out, strict=True))
                kept.append(rows)
                latents = latents - 0.05 * (rows[0] + rows[1])[None]
        outputs[order[0]] = kept
    for a, b in zip(outputs[0], outputs[1], strict=True):
        for i in (0, 1):
            torch.testing.assert_close(a[i], b[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ratio", [1.0, 0.3])
@pytest.mark.parametrize("family", ["wan", "sd3", "lumina2"])
def test_guidance_switched_off_in_mid_run(family, ratio):
    pipe = make(family)

    def switch_off(pipe, step, timestep, kwargs):
        if step == 4:
            pipe._guidance_scale = 1.0
            return {name: x[-1:] for name, x in kwargs.items()} if family == "sd3" else kwargs
        return kwargs

    if family == "lumina2":
        changed = {"cfg_trunc_ratio": 0.5}
    else:
        changed = {"callback_on_step_end": switch_off}
        if family == "sd3":
            changed["callback_on_step_end_tensor_inputs"] = [
                "prompt_embeds",
                "pooled_prompt_embeds",
            ]
    plain = run(pipe, family, **changed)
    dit_accel.enable(pipe, ras={**SPARSE, "ratio": ratio})
    result = run(pipe, family, **changed)
    report = dit_accel.summary(pipe).ras
    if ratio == 1.0:
        assert relative(result, plain) < 1e-6
        assert report.ras_steps == 0
    else:
        assert 0 < relative(result, plain) < 0.2
    if family == "sd3":  # the shorter batch is a context of its own, and its first call is dense
        assert report.steps[5].dense_calls == {"first call of a context": 1}
        assert not report.steps[7].dense_calls
    torch.testing.assert_close(run(pipe, family, **changed), result, rtol=0, atol=0)


def test_skip_layer_guidance_works():
    """Skip-layer guidance of SD3.5: a third call with half of the rows."""
    pipe = make("sd35")
    changed = {
        "skip_guidance_layers": [1],
        "skip_layer_guidance_start": 0.05,
        "skip_layer_guidance_stop": 0.8,
    }
    plain = run(pipe, "sd35", (0, 1), **changed)
    dit_accel.enable(pipe, ras={**SPARSE, "ratio": 1.0})
    assert relative(run(pipe, "sd35", (0, 1), **changed), plain) < 1e-6
    dit_accel.disable(pipe)
    dit_accel.enable(pipe, ras=SPARSE)
    both = run(pipe, "sd35", (0, 1), **changed)
    assert 0 < relative(both, plain) < 0.2
    assert engine(pipe).steps[3].calls == 2
    for i in (0, 1):
        assert relative(run(pipe, "sd35", (i,), **changed)[0], both[i]) < 1e-5


def test_calls_past_the_last_step_are_dense_and_counted():
    """Single calls after a run belong to no sampling loop."""
    pipe = make("sd3")
    text = embeddings("sd3", [0])
    call = {
        "hidden_states": torch.randn(1, 16, 22, 26),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": text["prompt_embeds"],
        "pooled_projections": text["pooled_prompt_embeds"],
    }
    with torch.no_grad():
        plain = pipe.transformer(**call).sample
        dit_accel.enable(pipe, ras={**SPARSE, "tail": 0})
        run(pipe, "sd3")
        for _ in range(3):
            torch.testing.assert_close(pipe.transformer(**call).sample, plain, rtol=0, atol=0)
    reasons = dit_accel.summary(pipe).ras.dense_calls
    assert reasons == {"no sampling loop drives this call": 3}


def test_gradients_are_refused():
    pipe = make("sd3")
    dit_accel.enable(pipe, ras=SPARSE)
    with pytest.raises(RuntimeError, match="ras: gradients"):
        pipe.transformer(
            hidden_states=torch.zeros(1, 16, 22, 26),
            timestep=torch.zeros(1),
            encoder_hidden_states=torch.zeros(1, 12, 24),
            pooled_projections=torch.zeros(1, 16),
        )


# Other pipelines of the same transformer -----------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.0, 0.3])
@pytest.mark.parametrize("kind", ["img2img", "inpaint"])
@pytest.mark.combines("ras partial", "image to image")
def test_img2img_and_inpainting_plan_the_steps_they_really_run(kind, ratio):
    from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline

    text = make("sd3")
    components = dict(text.components)
    if kind == "img2img":
        pipe = StableDiffusion3Img2ImgPipeline(**components)
    else:
        pipe = StableDiffusion3InpaintPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 176, 208, generator=torch.Generator().manual_seed(0))

    def call():
        texts = embeddings("sd3", [0])
        negative = {f"negative_{k}": v for k, v in embeddings("sd3", [-3]).items()}
        extra = {"image": image}
        if kind == "inpaint":
            extra["mask_image"] = (image.mean(1, keepdim=True) > 0.5).float()
        return pipe(
            **texts,
            **negative,
            **extra,
            height=176,
            width=208,
            strength=0.6,
            num_inference_steps=20,
            guidance_scale=2.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images

    plain = call()
    dit_accel.enable(pipe, ras={"ratio": ratio})
    result = call()
    report = dit_accel.summary(pipe).ras
    assert len(report.steps) == 12  # 60 % of 20
    dense = [step.step for step in report.steps if step.dense_calls]
    resets = [] if ratio == 1.0 else [4, 6]  # 12 * .3 updates of a token are few
    assert dense == [0, 1, 2, *resets, 10, 11]
    assert (relative(result, plain) < 1e-6) == (ratio == 1.0)
    assert relative(result, plain) < 0.2


@pytest.mark.combines("ras partial", "image to image")
def test_video_to_video_finds_its_begin_without_being_told():
    """WanVideoToVideoPipeline cuts the timesteps and does not set begin_index."""
    pipe = make("wan", "unipc")
    dit_accel.enable(pipe, ras={**SPARSE, "resets": ()})
    pipe.scheduler.set_timesteps(20)
    text, latents = embeddings("wan", [0])["prompt_embeds"], torch.zeros(1, 4, 3, 14, 18)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps[8:]:
            velocity = pipe.transformer(latents, t.expand(1), text, return_dict=False)[0]
            latents = pipe.scheduler.step(velocity, t, latents, return_dict=False)[0]
    report = dit_accel.summary(pipe).ras
    assert len(report.steps) == 12
    assert [x.step for x in report.steps if x.dense_calls] == [0, 1, 11]


@pytest.mark.combines("ras partial", "ControlNet")
def test_controlnet_residuals_are_reduced_to_the_active_tokens():
    pipe = make("sd3")
    transformer = pipe.transformer
    residuals = [
        0.3 * torch.randn(2, 143, 32, generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    ]
    add = transformer.register_forward_pre_hook(
        lambda m, a, k: (a, {**k, "block_controlnet_hidden_states": list(residuals)}),
        with_kwargs=True,
    )
    plain = run(pipe, "sd3")
    dit_accel.enable(pipe, ras={**SPARSE, "ratio": 1.0})
    assert relative(run(pipe, "sd3"), plain) < 1e-6
    dit_accel.disable(pipe)
    dit_accel.enable(pipe, ras=SPARSE)
    result = run(pipe, "sd3")
    assert ras_steps(pipe) == 6
    assert 0 < relative(result, plain) < 0.2
    add.remove()
    assert relative(run(pipe, "sd3"), result) > 1e-3


@pytest.mark.refuses("ras partial", "IP-Adapter", because="its processors are unknown")
def test_ip_adapters_are_refused_by_name():
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0

    pipe = make("sd3")
    block = pipe.transformer.transformer_blocks[1]
    stock = block.attn.processor
    block.attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(32, 32, 16, timesteps_emb_dim=32))
    with pytest.raises(ValueError, match=r"blocks\.1\.attn: .*SD3IPAdapterJoint"):
        dit_accel.enable(pipe, ras=SPARSE)
    block.attn.set_processor(stock)
    dit_accel.enable(pipe, ras=SPARSE)
    with pytest.raises(ValueError, match="ip_adapter_image_embeds: "):
        run(pipe, "sd3", joint_attention_kwargs={"ip_adapter_image_embeds": torch.zeros(1)})


@every_family
def test_processors_changed_after_enable_are_noticed(family):
    pipe = make(family)
    dit_accel.enable(pipe, ras=SPARSE)
    session = installation_of(pipe)
    module = next(iter(session.layers.values())).module
    module.set_processor(module.processor.stock)
    with pytest.raises(RuntimeError, match=r"attn.*changed"):
        run(pipe, family)


@pytest.mark.parametrize("fused_first", [True, False])
@pytest.mark.parametrize("family", ["wan", "sd3"])
@pytest.mark.combines("ras partial", "fused QKV")
def test_fused_projections(family, fused_first):
    pipe = make(family)
    plain = run(pipe, family)
    if not fused_first:
        dit_accel.enable(pipe, ras={**SPARSE, "ratio": 1.0})
    pipe.transformer.fuse_qkv_projections()
    if fused_first:
        dit_accel.enable(pipe, ras={**SPARSE, "ratio": 1.0})
    elif family == "sd3":  # it replaces the processors
        with pytest.raises(RuntimeError, match="changed"):
            run(pipe, family)
        return
    assert relative(run(pipe, family), plain) < 1e-5


@pytest.mark.parametrize("family", ["wan", "sd3", "lumina2"])
@pytest.mark.combines("ras partial", "LoRA")
def test_lora_works(family):
    from peft import LoraConfig

    pipe = make(family)
    dit_accel.enable(pipe, ras={**SPARSE, "ratio": 1.0})
    without = run(pipe, family)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["to_k", "to_v", "to_q"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    accelerated = run(pipe, family)
    assert relative(accelerated, without) > 1e-4
    dit_accel.disable(pipe)
    assert relative(accelerated, run(pipe, family)) < 1e-6


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((x, torch.bfloat16) for x in FAMILIES), ("wan", torch.float16), ("lumina2", torch.float16)],
    ids=str,
)
def test_half_precision_pipelines(family, dtype):
    pipe = make(family).to(dtype)
    plain = run(pipe, family)
    dit_accel.enable(pipe, ras={**SPARSE, "kv_predictor": "linear"})
    state = []

    def look(pipe, step, timestep, kwargs):
        for context in installation_of(pipe).clock.run.contexts.values():
            if context.states.get("ras") is not None:
                state.extend(k.last.data.dtype for k, _ in context.states["ras"].kv.values())
        return kwargs

    result = run(pipe, family, callback_on_step_end=look)
    assert result.dtype == plain.dtype
    assert relative(result.float(), plain.float()) < 0.2
    assert set(state) == {dtype}


def test_autocast_decides_the_dtype_of_cached_keys():
    pipe = make("sd3")
    dit_accel.enable(pipe, ras=SPARSE)
    with torch.autocast("cpu", torch.bfloat16):
        latents = run(pipe, "sd3")
    assert torch.isfinite(latents).all()
    assert ras_steps(pipe) == 6


# Caches beside us ----------------------------------------------------------------------------------


@pytest.mark.refuses("ras forecast", "step caches", because="both decide what a step computes")
def test_step_caches_are_refused_in_both_directions():
    from diffusers import FirstBlockCacheConfig

    pipe = make("wan")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"ras: .*step cache"):
        dit_accel.enable(pipe, ras="balanced")
    pipe.transformer.disable_cache()
    dit_accel.enable(pipe, ras="balanced")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(RuntimeError, match=r"ras: .*step cache"):
        run(pipe, "wan")
    pipe.transformer.disable_cache()
    run(pipe, "wan")
    assert ras_steps(pipe) > 0


@every_family
def test_what_a_prompt_decides_is_computed_once_and_changes_nothing(family):
    """Text keys, refined text and rotary tables: bit-equal to not caching them."""
    pipe = make(family)
    plain = run(pipe, family, (0, 1))
    dit_accel.enable(pipe, ras={"ratio": 0.5, "warmup": 1.0})
    torch.testing.assert_close(run(pipe, family, (0, 1)), plain, rtol=0, atol=0)
    modules = {
        "wan": lambda t: [t.blocks[0].attn2.to_k],
        "lumina": lambda t: [t.layers[0].attn2.to_k],
    }.get(family, lambda t: [])(pipe.transformer)
    calls = []
    for module in modules:
        module.register_forward_hook(lambda m, a, out: calls.append(a[0].shape[1]))
    refined = []
    if family == "lumina2":
        pipe.transformer.context_refiner[1].feed_forward.register_forward_hook(
            lambda m, a, out: refined.append(a[0].shape[1])
        )
    run(pipe, family, (0, 1))
    contexts = 2 if family in ("wan", "lumina2") else 1
    assert len(calls) == contexts * len(modules)
    if refined:
        assert sorted(refined) == [1] * 18 + [12] * 2


# Memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "policy", "predictor"),
    [
        *((x, "full", "linear") for x in FAMILIES),
        *(("sd3", "full", "hold"), ("wan", "fp8", "hold"), ("lumina2", "fp8", "linear")),
    ],
)
def test_estimated_memory_is_what_is_taken(family, policy, predictor):
    pipe = make(family)
    ras = {**SPARSE, "kv_cache": policy, "kv_predictor": predictor}
    sizes = {"height": 176, "width": 208}
    if family == "wan":
        sizes = {"height": 112, "width": 144, "num_frames": 9}
    estimate = dit_accel.estimate_memory(
        pipe, **sizes, ras=ras, batch_size=2, max_sequence_length=6
    )
    dit_accel.enable(pipe, ras=ras)
    taken = []

    def look(pipe, step, timestep, kwargs):
        states = [c.states.get("ras") for c in installation_of(pipe).clock.run.contexts.values()]
        taken.append(
            (sum(s.nbytes for s in states if s), sum(s.outputs.nbytes for s in states if s))
        )
        return kwargs

    run(pipe, family, (0, 1), callback_on_step_end=look)
    kv, output = taken[3]
    assert kv == pytest.approx(estimate.kv_bytes, rel=0.05)
    assert output == estimate.output_bytes
    assert estimate.total_bytes == estimate.kv_bytes + estimate.output_bytes
    assert (estimate.fits, estimate.kv_predictor) == (True, predictor)
    assert dit_accel.summary(pipe).ras.kv_bytes == kv


def test_a_size_that_is_none_is_refused_before_memory_is_estimated():
    pipe = make("sd3")
    for name, value in (("height", 0), ("width", -64), ("batch_size", True)):
        sizes = {"height": 64, "width": 64, name: value}
        with pytest.raises(ValueError, match=f"^{name}={value!r}: "):
            dit_accel.estimate_memory(pipe, **sizes)
    with pytest.raises(ValueError, match="height=8, width=64: "):
        dit_accel.estimate_memory(pipe, height=8, width=64)


@every_family
def test_too_little_memory_turns_ras_off_for_that_run_with_a_warning(family, monkeypatch):
    pipe = make(family)
    plain = run(pipe, family)
    dit_accel.enable(pipe, ras=SPARSE)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.warns(UserWarning, match=r"ras: .*keys and values"):
        result = run(pipe, family)
    torch.testing.assert_close(result, plain, rtol=0, atol=0)
    report = dit_accel.summary(pipe).ras
    assert report.ras_steps == 0
    assert set(report.dense_calls) == {"not enough memory for cached keys and values"}
    assert report.kv_bytes == 0
    with pytest.raises(RuntimeError, match="ras: "):
        dit_accel.summary(pipe, strict=True)
    monkeypatch.undo()
    run(pipe, family)
    assert ras_steps(pipe) > 0


def test_extrapolated_keys_are_given_up_before_ras_is(monkeypatch):
    pipe = make("wan")
    sizes = {"height": 112, "width": 144, "num_frames": 9}
    held = dit_accel.estimate_memory(pipe, **sizes, ras={"ratio": 0.5, "kv_predictor": "hold"})
    dit_accel.enable(pipe, ras={"ratio": 0.5})
    run(pipe, "wan", steps=20)
    assert dit_accel.summary(pipe).ras.kv_predictor == "linear"
    run(pipe, "wan", steps=19)
    assert dit_accel.summary(pipe).ras.kv_predictor == "hold"
    free = int(1.5 * held.kv_bytes) + held.working_bytes
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    run(pipe, "wan", steps=20)
    assert dit_accel.summary(pipe).ras.kv_predictor == "hold"
    assert ras_steps(pipe) > 0
    for ras, kv_predictor, fits in (
        ({"ratio": 0.5}, "hold", True),
        ({"ratio": 0.5, "kv_predictor": "linear"}, "linear", False),
    ):
        estimate = dit_accel.estimate_memory(pipe, **sizes, ras=ras)
        assert (estimate.kv_predictor, estimate.fits) == (kv_predictor, fits)


@pytest.mark.parametrize("family", ["wan", "sd3"])
def test_the_room_left_for_the_models_own_work_is_enough(family):
    """Peak memory of a dense call at full size, computed with fake tensors."""
    with FakeTensorMode(), torch.no_grad():
        transformer, inputs, layer = full_size(family)
        with LiveBytes() as live:
            transformer(**inputs)
    rows = len(inputs["hidden_states"])
    plan = memory.plan_cache(
        RASConfig(ratio=0.5), 50, [layer], rows=rows, contexts=1, itemsize=4, free=2**40
    )
    assert 0.3 * plan.working_bytes < live.peak < plan.working_bytes


def full_size(family):
    """Return two layers of Wan2.1 1.3B at 480p with 81 frames, or of Stable Diffusion 3 at 1024 x 1024."""
    from diffusers import SD3Transformer2DModel, WanTransformer3DModel

    timestep = torch.zeros(2, dtype=torch.long)
    if family == "wan":
        transformer = WanTransformer3DModel(
            num_layers=2, num_attention_heads=12, attention_head_dim=128, ffn_dim=8960
        )
        inputs = {"hidden_states": torch.zeros(2, 16, 21, 60, 104)}
        text, layer = torch.zeros(2, 512, 4096), memory.Layer(32760, 12, 128, 1536)
    else:
        transformer = SD3Transformer2DModel(
            num_layers=2,
            num_attention_heads=24,
            attention_head_dim=64,
            caption_projection_dim=1536,
            pos_embed_max_size=192,
        )
        inputs = {
            "hidden_states": torch.zeros(2, 16, 128, 128),
            "pooled_projections": torch.zeros(2, 2048),
        }
        text, layer = torch.zeros(2, 333, 4096), memory.Layer(4096 + 333, 24, 64, 1536)
    return transformer, {**inputs, "timestep": timestep, "encoder_hidden_states": text}, layer


class LiveBytes(TorchDispatchMode):
    """Mode that records the peak memory of tensors."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return out

    def forget(self, key, size):
        self.known.discard(key)
        self.live -= size


# Together with sparse attention ---------------------------------------------------------------------


def test_sparse_attention_can_be_added_and_sees_all_keys():
    pipe = make("wan")
    sla = {"topk": 1.0, "block_q": 16, "block_k": 16, "crossover": "never", "dense_layers": 0}
    sla["order"] = "raster"  # else the tiles that RAS selects would be others
    dit_accel.enable(pipe, ras=SPARSE)
    alone = run(pipe, "wan")
    dit_accel.enable(pipe, sla=sla)
    both = run(pipe, "wan")
    report = dit_accel.summary(pipe, strict=True)
    assert report.ras.ras_steps == 6
    assert report.sparse_calls > 0
    assert relative(both, alone) < 1e-5
    dit_accel.disable(pipe)
    assert not dit_accel.summary(pipe).enabled


# Bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ras", "message"),
    [
        ({"ratio": 0}, "ratio=0: "),
        ({"ratio": 1.5}, r"ratio=1\.5"),
        ({"ratio": 0.1, "max_age": 3}, "max_age=3: .*9"),
        ({"selection": "attention"}, "selection='attention'.*'age'.*'std'"),
        ({"ratios": 0.5}, "'ratios'.*'ratio'"),
        ("balancd", "ras='balancd': .*'balanced'"),
        (None, "ras=None"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_before_anything_changes(ras, message, unchecked):
    pipe = make("sd3")
    with pytest.raises(ValueError, match=message):
        dit_accel.enable(pipe, ras=ras)
    assert installation_of(pipe) is None


def test_timesteps_of_another_number_of_tokens_are_refused():
    pipe = make("wan")
    dit_accel.enable(pipe, ras=SPARSE)
    with (
        pytest.raises(ValueError, match=r"timestep: .*\(1, 3\).*4 tokens"),
        torch.no_grad(),
    ):
        pipe.transformer(torch.zeros(1, 4, 1, 4, 4), torch.zeros(1, 3), torch.zeros(1, 12, 24))


def test_schedulers_without_noise_levels_are_refused():
    class Silent:
        timesteps = torch.arange(5)

    pipe = make("sd3")
    dit_accel.enable(pipe, ras=SPARSE)
    object.__setattr__(pipe, "scheduler", Silent())
    with pytest.raises(ValueError, match=r"scheduler: Silent.*sigmas"), torch.no_grad():
        pipe.transformer(
            hidden_states=torch.zeros(1, 16, 22, 26),
            timestep=torch.zeros(1),
            encoder_hidden_states=torch.zeros(1, 12, 24),
            pooled_projections=torch.zeros(1, 16),
        )


@every_family
def test_fewer_tokens_than_a_tile_run_dense_and_are_counted(family):
    pipe = make(family)
    size = {"height": 48, "width": 64}
    if family == "wan":
        size["num_frames"] = 1
    plain = run(pipe, family, **size)
    dit_accel.enable(pipe, ras=SPARSE)
    torch.testing.assert_close(run(pipe, family, **size), plain, rtol=0, atol=0)
    reasons = dit_accel.summary(pipe).ras.dense_calls
    assert list(reasons) == ["12 tokens are not more than a tile of 16"]


def test_guidance_is_not_asked_of_the_pipeline_that_was_enabled():
    """Another pipeline or a copy may run the same transformer with other guidance."""
    import copy

    first = make("sd3")
    plain = run(make("sd3"), "sd3", (0, 1), guidance=1.0)
    second = type(first)(**first.components)
    second.set_progress_bar_config(disable=True)
    dit_accel.enable(first, ras={**SPARSE, "selection": "std"})
    run(first, "sd3")
    twin = copy.deepcopy(first)
    alone = make("sd3")
    dit_accel.enable(alone, ras={**SPARSE, "selection": "std"})
    expected = run(alone, "sd3", (0, 1), guidance=1.0)
    for pipe in (second, twin):
        result = run(pipe, "sd3", (0, 1), guidance=1.0)
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert 0 < relative(expected, plain) < 0.2


def test_a_failed_enable_leaves_on_what_was_on():
    pipe = make("wan")
    dit_accel.enable(pipe, ras=SPARSE)
    expected = run(pipe, "wan")
    with pytest.raises(ValueError, match="dense_layers=99"):
        dit_accel.enable(pipe, sla={"dense_layers": [99]})
    torch.testing.assert_close(run(pipe, "wan"), expected, rtol=0, atol=0)
    assert ras_steps(pipe) == 6


def test_a_wrapped_transformer_is_still_found():
    pipe = make("sd3")
    plain = run(pipe, "sd3")
    dit_accel.enable(pipe, ras=SPARSE)
    inner = pipe.transformer
    pipe.transformer = torch.compile(inner, backend="eager")
    assert dit_accel.summary(pipe).enabled
    dit_accel.disable(pipe)
    pipe.transformer = inner
    torch.testing.assert_close(run(pipe, "sd3"), plain, rtol=0, atol=0)


def test_an_own_loop_with_embeddings_made_anew_keeps_its_steps():
    pipe = make("sd3")
    dit_accel.enable(pipe, ras=SPARSE)
    pipe.scheduler.set_timesteps(10)
    text = embeddings("sd3", [0])
    latents = torch.randn(1, 16, 22, 26)
    session = installation_of(pipe)
    seen = []
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            for context in (torch.zeros_like(text["prompt_embeds"]), text["prompt_embeds"]):
                velocity = pipe.transformer(
                    hidden_states=latents,
                    timestep=t.expand(1),
                    encoder_hidden_states=context,
                    pooled_projections=text["pooled_prompt_embeds"],
                    return_dict=False,
                )[0]
                seen.append(session.clock.run.step)
            latents = pipe.scheduler.step(velocity, t, latents, return_dict=False)[0]
    assert seen == [step for step in range(10) for _ in range(2)]
    assert ras_steps(pipe) == 6


def test_a_schedule_of_dense_steps_only_says_so():
    pipe = make("sd3")
    dit_accel.enable(pipe, ras="balanced")
    with pytest.warns(UserWarning, match=r"ras: .*dense"):
        run(pipe, "sd3", steps=3)
    report = dit_accel.summary(pipe)
    assert list(report.ras.dense_calls) == ["the schedule has dense steps only"]
    assert json.dumps(report.to_dict())
    assert "3 dense" in str(report)
