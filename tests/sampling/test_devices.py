"""Device and dtype of a command."""

from pathlib import Path

import pytest
import torch

from dit_accel.sampling.devices import device_name, pick_device, pick_dtype
from dit_accel.sampling.load import load_pipeline, pipeline_class


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.parametrize("gpu", [True, False])
def test_auto_is_the_gpu_where_there_is_one(monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert device_name() == ("cuda" if gpu else "cpu")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_name() == ("cuda:3" if gpu else "cpu")
    assert device_name("cuda:1") == "cuda:1"


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "", "cpu:x", "cuda:-1"])
def test_devices_that_are_not_there_are_named(device):
    with pytest.raises(ValueError, match=f"device='{device}'"):
        pick_device(device)
    assert pick_device("cpu") == torch.device("cpu")


def test_precision():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    assert [pick_dtype("auto", x) for x in (cpu, gpu)] == [torch.float32, torch.bfloat16]
    assert pick_dtype("fp16", cpu) is torch.float16


def test_embedded_models_are_loaded_without_the_hub(monkeypatch, tmp_path):
    import diffusers

    real = diffusers.DiffusionPipeline.load_config

    def local(source, **options):
        assert Path(source).is_dir(), "asked the hub"
        return real(source, **options)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", local)
    monkeypatch.chdir(tmp_path)
    assert pipeline_class("tiny-wan").__qualname__ == "SparseWanPipeline"
    pipe = load_pipeline("tiny-sd3", sla=None, device="cpu", dtype="bf16")
    assert type(pipe).__qualname__ == "SparseStableDiffusion3Pipeline"
    assert pipe.transformer.dtype == torch.bfloat16
