"""Sparse attention in pipelines on a CUDA device: the same as on a CPU, without synchronisation."""

import warnings
from dataclasses import replace

import pytest
import torch

import dit_accel
from dit_accel.checkpoint.companion import Companion
from dit_accel.checkpoint.file import write_checkpoint
from dit_accel.checkpoint.save_load import checkpoint_of
from dit_accel.runtime.install import method_of

from ..random_pipelines import FAMILIES, make, relative, run

pytestmark = pytest.mark.gpu
every_family = pytest.mark.parametrize("family", FAMILIES)
SLA = {"topk": 0.3, "block_q": 32, "block_k": 32, "dense_steps": 1, "crossover": "never"}
RAS = {"ratio": 0.4, "warmup": 2, "tail": 1, "kv_predictor": "hold"}
MODES = ("none", "shared_softmax", "proj", "alpha")


@every_family
@pytest.mark.parametrize("combine", MODES)
@pytest.mark.parametrize("ras", [None, RAS], ids=["sla", "ras-sla"])
def test_equals_the_cpu(family, combine, ras):
    latents = []
    for device in ("cpu", "cuda"):
        pipe = make(family).to(device)
        dit_accel.enable(pipe, sla={**SLA, "combine": combine, "order": (2, 4, 4)}, ras=ras)
        generator = torch.Generator().manual_seed(0)
        for module in method_of(pipe, "sla").attention.values():
            module.calibrated = True
            with torch.no_grad():
                for parameter in module.parameters():
                    drawn = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(0.2 * drawn)
        latents.append(run(pipe, family).cpu())
        assert dit_accel.summary(pipe, strict=True).density < 1
    assert relative(latents[1], latents[0]) < 1e-2


@every_family
def test_reading_everything_equals_plain_in_half_precision(family):
    pipe = make(family).to("cuda", torch.bfloat16)
    plain = run(pipe, family)
    dit_accel.enable(pipe, sla={**SLA, "topk": 1.0, "order": (2, 4, 4)})
    assert relative(run(pipe, family).float(), plain.float()) < 2e-2


@pytest.mark.parametrize("family", ["wan", "sd3"])
def test_offload(family):
    pipe = make(family).to("cuda")
    dit_accel.enable(pipe, sla={**SLA, "combine": "proj"})
    expected = run(pipe, family)
    pipe.to("cpu")
    pipe.enable_model_cpu_offload()
    for _ in range(2):
        torch.testing.assert_close(run(pipe, family), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["wan", "sd3"])
@pytest.mark.parametrize("ras", [None, RAS], ids=["sla", "ras-sla"])
def test_no_wait_is_added_to_the_loop(family, ras):
    """The plain pipeline's own waits are allowed; torch raises at any other."""
    pipe = make(family).to("cuda")
    counts = []
    for sla in (None, {**SLA, "order": (2, 4, 4)}):
        if sla is not None:
            dit_accel.enable(pipe, sla=sla, ras=ras)
        run(pipe, family)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            run(pipe, family)
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(x.message) for x in seen))
    assert counts[1] <= counts[0]


@pytest.mark.parametrize("offload", [None, "model", "group", "streams"])
def test_fine_tuned_weights_come_and_go(offload, tmp_path):
    tuned = make("wan")
    dit_accel.enable(tuned, sla=SLA)
    stored = checkpoint_of(tuned)
    with torch.no_grad():
        for x in tuned.transformer.parameters():
            x.mul_(1.1)
    tuned.transformer.save_pretrained(tmp_path / "transformer")
    companion = Companion.open(tmp_path / "transformer", "weights")
    write_checkpoint(tmp_path / "sla.safetensors", replace(stored, companion=companion))
    expected = run(tuned.to("cuda"), "wan")

    def prepared(pipe):
        if offload is None:
            pipe.to("cuda")
        elif offload == "model":
            pipe.enable_model_cpu_offload()
        else:
            device = torch.device("cuda")
            pipe.vae.to(device)
            pipe.transformer.enable_group_offload(
                onload_device=device, offload_type="leaf_level", use_stream=offload == "streams"
            )
        return pipe

    plain = {name: x.clone() for name, x in make("wan").transformer.state_dict().items()}
    for first in (True, False):
        pipe = make("wan") if first else prepared(make("wan"))
        dit_accel.enable(pipe, sla=tmp_path)
        if first:
            prepared(pipe)
        for _ in range(2):
            torch.testing.assert_close(run(pipe, "wan"), expected, rtol=1e-4, atol=1e-4)
        dit_accel.disable(pipe)
        found = pipe.transformer.state_dict()
        assert all(torch.equal(x.cpu(), plain[name]) for name, x in found.items())
        dit_accel.enable(pipe, sla=tmp_path)
        torch.testing.assert_close(run(pipe, "wan"), expected, rtol=1e-4, atol=1e-4)
