"""Region-adaptive sampling on a CUDA device: the same as on a CPU, without synchronisation, and memory is freed."""

import warnings

import pytest
import torch

import dit_accel

from ..random_pipelines import FAMILIES, make, relative, run

pytestmark = pytest.mark.gpu
every_family = pytest.mark.parametrize("family", FAMILIES)
SPARSE = {"ratio": 0.3, "warmup": 2, "tail": 1, "resets": (6,)}


@every_family
@pytest.mark.parametrize("kv", ["hold", "linear"])
def test_equals_the_cpu(family, kv):
    latents = []
    for device in ("cpu", "cuda"):
        pipe = make(family).to(device)
        dit_accel.enable(pipe, ras={**SPARSE, "kv_predictor": kv})
        latents.append(run(pipe, family, (0, 1)).cpu())
        assert dit_accel.summary(pipe, strict=True).ras.ras_steps == 6
    assert relative(latents[1], latents[0]) < 1e-3


@every_family
def test_ratio_one_equals_plain_in_half_precision(family):
    pipe = make(family).to("cuda", torch.bfloat16)
    plain = run(pipe, family)
    dit_accel.enable(pipe, ras={"ratio": 1.0, "warmup": 1, "tail": 1, "resets": []})
    assert relative(run(pipe, family).float(), plain.float()) < 2e-2


@every_family
def test_memory_returns_after_the_run(family):
    pipe = make(family).to("cuda")
    run(pipe, family)
    before = torch.cuda.memory_allocated()
    dit_accel.enable(pipe, ras=SPARSE)
    run(pipe, family)
    # What stays is the record of the run: active tiles and ages.
    assert torch.cuda.memory_allocated() - before < 1 << 20


@pytest.mark.parametrize("family", ["wan", "sd3"])
def test_offload(family):
    pipe = make(family).to("cuda")
    dit_accel.enable(pipe, ras=SPARSE)
    expected = run(pipe, family)
    pipe.to("cpu")
    pipe.enable_model_cpu_offload()
    for _ in range(2):
        torch.testing.assert_close(run(pipe, family), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["wan", "sd3"])
def test_ras_adds_no_wait_to_the_loop(family):
    """The plain pipeline's own waits are allowed; torch raises at any other."""
    pipe = make(family).to("cuda")
    counts = []
    for ras in (None, {**SPARSE, "kv_predictor": "linear"}):
        if ras is not None:
            dit_accel.enable(pipe, ras=ras)
        run(pipe, family)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            run(pipe, family)
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(x.message) for x in seen))
    assert counts[1] <= counts[0]
