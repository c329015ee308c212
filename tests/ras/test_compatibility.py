"""Schedulers that draw noise in each step, step caches put on by functions, and other default dtypes."""

import diffusers
import pytest
import torch

import dit_accel
from dit_accel.ras.compatibility import noise_of

from ..random_pipelines import FAMILIES, make, relative, run

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SLA = {"topk": 0.3, "block_q": 16, "block_k": 16, "crossover": "never", "dense_steps": 1}
NOISY = {
    "stochastic Euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0, stochastic_sampling=True
    ),
    "LCM": lambda: diffusers.FlowMatchLCMScheduler(shift=3.0),
    "SDE": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **FLOW),
    "SA": lambda: diffusers.SASolverScheduler(**FLOW),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.filterwarnings("ignore:dit_accel accelerated nothing")
@pytest.mark.parametrize("name", NOISY)
def test_steps_that_begin_at_fresh_noise_run_dense_and_are_counted(name):
    pipe = make("sd3")
    pipe.scheduler = NOISY[name]()
    torch.manual_seed(0)
    plain = run(pipe, "sd3")
    dit_accel.enable(pipe, ras="fast")
    torch.manual_seed(0)
    torch.testing.assert_close(run(pipe, "sd3"), plain, rtol=0, atol=0)
    report = dit_accel.summary(pipe).ras
    assert report.ras_steps == 0
    assert all("noise" in reason for x in report.steps for reason in x.dense_calls)
    dit_accel.enable(pipe, sla=SLA)
    torch.manual_seed(0)
    run(pipe, "sd3")
    assert dit_accel.summary(pipe).sparse_calls > 0


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.FlowMatchHeunDiscreteScheduler(),
        diffusers.UniPCMultistepScheduler(),
        diffusers.DPMSolverMultistepScheduler(**FLOW),
        None,
    ],
    ids=lambda x: type(x).__name__,
)
def test_schedulers_without_noise_are_not_mistaken(scheduler):
    assert noise_of(scheduler) is None


def first_block(transformer):
    config = diffusers.hooks.FirstBlockCacheConfig(threshold=0.1)
    diffusers.hooks.apply_first_block_cache(transformer, config)


def magnitude(transformer):
    config = diffusers.hooks.MagCacheConfig(num_inference_steps=10, mag_ratios=torch.ones(20))
    diffusers.hooks.apply_mag_cache(transformer, config)


def pyramid(transformer):
    config = diffusers.hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    diffusers.hooks.apply_pyramid_attention_broadcast(transformer, config)


@pytest.mark.parametrize("put_on", [first_block, magnitude, pyramid])
def test_step_caches_put_on_by_functions_are_refused_in_both_orders(put_on):
    pipe = make("wan")
    put_on(pipe.transformer)
    with pytest.raises(ValueError, match="step cache"):
        dit_accel.enable(pipe, ras="balanced")
    assert not dit_accel.summary(pipe).enabled
    pipe = make("wan")
    dit_accel.enable(pipe, ras="balanced")
    put_on(pipe.transformer)
    with pytest.raises(RuntimeError, match="step cache"):
        run(pipe, "wan")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "ras", [{"ratio": 0.3, "warmup": 2}, "paper", {"ratio": 0.3, "kv_predictor": "linear"}], ids=str
)
def test_the_default_dtype_of_torch_changes_nothing(family, ras):
    pipe = make(family)
    dit_accel.enable(pipe, ras=ras, sla=SLA)
    expected = run(pipe, family)
    assert dit_accel.summary(pipe).ras.ras_steps > 0
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        result = run(pipe, family)
    finally:
        torch.set_default_dtype(before)
    assert relative(result, expected) < 0.02  # diffusers' own tables change a little
