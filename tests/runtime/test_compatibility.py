"""Schedulers that add noise, step caches of diffusers, other hooks, and default dtypes."""

import importlib
import inspect
import pkgutil

import pytest
import torch

import dit_accel

from ..random_pipelines import embeddings, make, relative, run
from .own_loops import RAS, SLA

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def scheduler_of(name, **config):
    import diffusers

    return getattr(diffusers, name)(**config)


NOISY = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    "lcm": ("FlowMatchLCMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {**FLOW, "algorithm_type": "sde-dpmsolver++"}),
    "single": ("DPMSolverSinglestepScheduler", {**FLOW, "algorithm_type": "sde-dpmsolver++"}),
    "sa": ("SASolverScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    "ancestral": ("LTXEulerAncestralRFScheduler", {}),
}
QUIET = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    "unipc": ("UniPCMultistepScheduler", FLOW),
    "dpm++": ("DPMSolverMultistepScheduler", FLOW),
    "dpm, second order midpoint": ("DPMSolverMultistepScheduler", {**FLOW, "solver_type": "heun"}),
    "single": ("DPMSolverSinglestepScheduler", FLOW),
    "deis": ("DEISMultistepScheduler", FLOW),
    "euler, karras": ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler, exponential": ("FlowMatchEulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    "euler, beta": ("FlowMatchEulerDiscreteScheduler", {"use_beta_sigmas": True}),
}


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("family", ["wan", "sd3"])
def test_schedulers_that_add_noise_run_dense(family, name):
    pipe = make(family)
    kind, config = NOISY[name]
    pipe.scheduler = scheduler_of(kind, **config)

    def call():
        torch.manual_seed(0)
        return run(pipe, family, steps=6)

    plain = call()
    dit_accel.enable(pipe, ras=RAS)
    with pytest.warns(UserWarning, match=f"noise.*{kind}"):
        assert relative(call(), plain) < 1e-5
    report = dit_accel.summary(pipe).ras
    assert report.ras_steps == 0
    assert len(report.steps) == 6
    [reason] = report.dense_calls
    assert kind in reason
    dit_accel.enable(pipe, sla=SLA)  # which such schedulers do not disturb
    call()
    assert dit_accel.summary(pipe).sparse_calls > 0
    pipe.scheduler = scheduler_of("FlowMatchEulerDiscreteScheduler")
    call()
    assert dit_accel.summary(pipe).ras.ras_steps == 3


@pytest.mark.parametrize("name", QUIET)
@pytest.mark.parametrize("family", ["wan", "sd3"])
def test_schedulers_that_add_none_keep_their_steps(family, name):
    pipe = make(family)
    kind, config = QUIET[name]
    pipe.scheduler = scheduler_of(kind, **config)
    if "beta" in name:
        pytest.importorskip("scipy")
    dit_accel.enable(pipe, ras=RAS)
    run(pipe, family, steps=6)
    steps = 11 if name == "heun" else 6
    report = dit_accel.summary(pipe).ras
    assert [x.mode for x in report.steps] == ["dense"] * 2 + ["partial"] * (steps - 3) + ["dense"]


@pytest.mark.parametrize(
    "parent",
    ["FlowMatchLCMScheduler", "EulerAncestralDiscreteScheduler", "SASolverScheduler"],
)
def test_subclasses_of_schedulers_that_add_noise(parent):
    import diffusers

    from dit_accel.ras.compatibility import noise_of

    mine = type("Mine", (getattr(diffusers, parent),), {})
    assert noise_of(mine())


def test_schedulers_with_a_config_of_another_kind():
    from types import SimpleNamespace

    from dit_accel.ras.compatibility import noise_of

    for config in (SimpleNamespace(shift=3.0), None):
        scheduler = SimpleNamespace(config=config)
        assert noise_of(scheduler) is None


ALWAYS_NOISY = {"randn_tensor", "torch.randn(", "torch.randn_like", "noise_sampler"}
NOT_OF_FLOW = {
    # Noise only where a call asks for it: `eta`, `s_churn`, `r_timestep`.
    "CogVideoXDDIMScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "EDMEulerScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    # Noise only with a config that the tests above name.
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    # Discrete tokens, point clouds of proteins.
    "AmusedScheduler",
    "BlockRefinementScheduler",
    "DiscreteDDIMScheduler",
    "EntropyBoundScheduler",
    "RFD4ProteinaScheduler",
    "VQDiffusionScheduler",
}


def all_schedulers():
    from diffusers import schedulers

    for module in pkgutil.iter_modules(schedulers.__path__):
        if not module.name.startswith("scheduling_") or "utils" in module.name:
            continue
        try:
            module = importlib.import_module(f"diffusers.schedulers.{module.name}")
        except ImportError:  # torchsde
            continue
        for name, kind in vars(module).items():
            mine = inspect.isclass(kind) and kind.__module__ == module.__name__
            if (
                mine
                and hasattr(kind, "step")
                and "sample" in inspect.signature(kind.step).parameters
            ):
                yield name, kind


def test_every_scheduler_of_diffusers_that_adds_noise_is_known():
    from dit_accel.ras.compatibility import NOISY_CLASSES

    missed, wrong = set(), set()
    for name, kind in all_schedulers():
        text = inspect.getsource(kind)
        draws = any(x in text for x in ALWAYS_NOISY)
        known = any(part in name for part in NOISY_CLASSES)
        if draws and not known and name not in NOT_OF_FLOW:
            missed.add(name)
        if known and not draws:
            wrong.add(name)
    assert not missed
    assert not wrong


# Step caches ----------------------------------------------------------------------------------------


def skip(pipe):
    return {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (-1, 1001),
        "current_timestep_callback": lambda: getattr(pipe, "current_timestep", 500),
    }


def caches(pipe):
    from diffusers import hooks

    return {
        "first_block": (
            hooks.apply_first_block_cache,
            hooks.FirstBlockCacheConfig(threshold=0.3),
        ),
        "mag": (
            hooks.apply_mag_cache,
            hooks.MagCacheConfig(
                threshold=0.5, num_inference_steps=6, mag_ratios=[1.0] + [0.98] * 5
            ),
        ),
        "pyramid": (
            hooks.apply_pyramid_attention_broadcast,
            hooks.PyramidAttentionBroadcastConfig(**skip(pipe)),
        ),
        "faster": (
            hooks.apply_faster_cache,
            hooks.FasterCacheConfig(
                spatial_attention_block_identifiers=(r"blocks.*attn1", r"blocks.*\.attn$"),
                attention_weight_callback=lambda _: 0.3,
                is_guidance_distilled=True,
                tensor_format="BCFHW",
                **skip(pipe),
            ),
        ),
        "taylor": (
            hooks.apply_taylorseer_cache,
            hooks.TaylorSeerCacheConfig(
                cache_interval=2,
                disable_cache_before_step=2,
                cache_identifiers=[r"blocks\.\d+\.attn1?$"],
                taylor_factors_dtype=torch.float32,
            ),
        ),
        "sea": (hooks.apply_sea_cache, hooks.SeaCacheConfig(threshold=10.0)),
        "text_kv": (hooks.apply_text_kv_cache, hooks.TextKVCacheConfig()),
    }


NAMES = ("first_block", "mag", "pyramid", "faster", "taylor", "sea", "text_kv")


UNUSABLE = {("sd3", "first_block"), ("sd3", "faster"), ("wan", "faster")}
"""Combinations that also fail in plain pipelines of diffusers (0.42)."""


def has_cache_hooks(transformer):
    """Return whether hooks were added: some caches support only some models."""
    registries = [getattr(x, "_diffusers_hook", None) for x in transformer.modules()]
    return any(x is not None and x.hooks for x in registries)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["wan", "sd3"])
@pytest.mark.refuses(
    "ras partial", "sla and ras", "step caches", because="both decide what a step computes"
)
def test_step_caches_put_on_by_function(family, name):
    pipe = make(family)
    apply, config = caches(pipe)[name]
    try:
        apply(pipe.transformer, config)
    except (ValueError, KeyError, AttributeError):
        pytest.skip("diffusers has no such cache for this model")
    if not has_cache_hooks(pipe.transformer):
        pytest.skip("diffusers has no such cache for this model")
    with pytest.raises(ValueError, match=r"ras: .*cache"):
        dit_accel.enable(pipe, ras=RAS)
    assert not dit_accel.summary(pipe).enabled
    sla = {**SLA, "dense_layers": 0}  # the first block always runs
    dit_accel.enable(pipe, sla=sla)
    with pytest.raises(ValueError, match=r"ras: .*cache"):
        dit_accel.enable(pipe, ras=RAS)
    assert set(dit_accel.summary(pipe).methods) == {"sla"}
    later = make(family)
    dit_accel.enable(later, ras=RAS)
    apply(later.transformer, caches(later)[name][1])
    with pytest.raises(RuntimeError, match=r"ras: .*cache"):
        run(later, family, steps=4)
    dit_accel.enable(later, sla=sla, ras="none")
    if (family, name) in UNUSABLE:
        return
    for accelerated in (pipe, later):
        run(accelerated, family, steps=6)
        assert dit_accel.summary(accelerated).sparse_calls > 0


@pytest.mark.parametrize("name", ["mag", "pyramid"])
def test_a_step_cache_put_on_in_mid_run(name):
    pipe = make("wan")
    dit_accel.enable(pipe, ras=RAS)
    apply, config = caches(pipe)[name]

    def put_on(pipe, step, timestep, kwargs):
        if step == 3:
            apply(pipe.transformer, config)
        return kwargs

    with pytest.raises(RuntimeError, match="cache"):
        run(pipe, "wan", callback_on_step_end=put_on)


def layer_skip(pipe):
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip

    fqn = "blocks" if hasattr(pipe.transformer, "blocks") else "transformer_blocks"
    config = LayerSkipConfig(indices=[1], fqn=fqn, skip_attention=False, skip_ff=True)
    apply_layer_skip(pipe.transformer, config)


def layerwise_casting(pipe):
    pipe.transformer.enable_layerwise_casting(torch.bfloat16, torch.float32)


def group_offloading(pipe):
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type="leaf_level"
    )


def own_hook(pipe):
    from diffusers.hooks import HookRegistry, ModelHook

    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    registry.register_hook(ModelHook(), "mine")


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("put_on", [layer_skip, layerwise_casting, group_offloading, own_hook])
@pytest.mark.parametrize("family", ["wan", "sd3"])
@pytest.mark.combines("ras partial", "group offload", "layerwise casting")
def test_hooks_that_are_no_step_caches(family, put_on, first):
    def made(ratio):
        pipe = make(family)
        if first:
            put_on(pipe)
        dit_accel.enable(pipe, ras={**RAS, "ratio": ratio})
        if not first:
            put_on(pipe)
        return pipe

    plain = make(family)
    put_on(plain)
    expected = run(plain, family, steps=6)
    assert relative(run(made(1.0), family, steps=6), expected) < 1e-5
    pipe = made(0.3)
    assert 1e-5 < relative(run(pipe, family, steps=6), expected) < 0.3
    assert dit_accel.summary(pipe).ras.ras_steps == 3


# Default dtypes -------------------------------------------------------------------------------------


@pytest.fixture
def default_dtype(request):
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


COMBINES = ("none", "shared_softmax", "proj", "alpha")
SETTINGS = {
    "ras": {"ras": RAS},
    "ras, paper": {"ras": "paper"},
    "ras, std": {"ras": {**RAS, "selection": "std", "kv_predictor": "linear"}},
    "ras, random": {"ras": {**RAS, "selection": "random", "kv_cache": "fp8"}},
    **{f"sla, {x}": {"sla": {**SLA, "combine": x}} for x in COMBINES},
    **{f"both, {x}": {"ras": RAS, "sla": {**SLA, "combine": x}} for x in COMBINES},
}


CASES = [(("wan", "sd3")[i % 2], x) for i, x in enumerate(SETTINGS)]
CASES += [("wan", "sla, proj"), ("wan", "both, proj"), ("sd3", "ras"), ("lumina2", "both, alpha")]


@pytest.mark.parametrize(
    ("family", "settings", "default_dtype"),
    [(*case, torch.bfloat16) for case in CASES]
    + [(*CASES[-2], torch.float16), (*CASES[-1], torch.float64)],
    indirect=["default_dtype"],
)
def test_default_dtypes(family, settings, default_dtype):
    """A default dtype does not change the latents of a model with its own dtype."""
    pipe = make(family)
    text = embeddings(family, [0]) | {
        f"negative_{name}": x for name, x in embeddings(family, [-3]).items()
    }
    plain = run(pipe, family, steps=4, **text)
    dit_accel.enable(pipe, **SETTINGS[settings])
    expected = run(pipe, family, steps=4, **text)
    dit_accel.disable(pipe)
    torch.set_default_dtype(default_dtype)
    other_plain = run(pipe, family, steps=4, **text)
    dit_accel.enable(pipe, **SETTINGS[settings])
    found = run(pipe, family, steps=4, **text)
    assert found.dtype == other_plain.dtype
    # What diffusers itself computes in the default dtype may differ, and no more than that.
    own = relative(other_plain, plain)
    assert relative(found, expected) <= 3 * own + 1e-6
    for weight in (
        x for m in pipe.transformer.modules() if hasattr(m, "proj_l") for x in m.parameters()
    ):
        assert weight.dtype == torch.float32
