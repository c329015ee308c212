"""Quantised transformers, alone and with sparse attention, region-adaptive sampling and both."""

import functools
import importlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import dit_accel
from dit_accel.config import SLAConfig
from dit_accel.files import asset
from dit_accel.sampling.load import load_pipeline
from dit_accel.sampling.quantize import QUANTIZED, loading_arguments, quantized_as

from ..cli.command import run

SLA = {"topk": 0.3, "block_q": 16, "block_k": 16, "crossover": "never"}
METHODS = {
    "dense": {},
    "sla": {"sla": SLA},
    "ras partial": {"ras": {"ratio": 0.5, "warmup": 2, "tail": 1, "resets": ()}},
    "ras forecast": {"ras": {"budget": 0.7, "warmup": 2, "tail": 1}},
}


def sample(pipe, steps=5):
    pipe.set_progress_bar_config(disable=True)
    clip = hasattr(pipe, "vae_scale_factor_temporal")
    made = pipe(
        prompt="a red circle moving right", height=64, width=64, num_inference_steps=steps,
        guidance_scale=2.0, output_type="np", generator=torch.Generator().manual_seed(0),
        **({"num_frames": 9} if clip else {}),
    )  # fmt: skip
    return made.frames if clip else made.images


def psnr(a, b):
    return -10 * np.log10(np.square(a - b).mean())


@functools.cache
def pipeline(model, name="none"):
    return load_pipeline(model, sla=None, **loading_arguments(name))


@functools.cache
def plain_pictures(model, label):
    """Return the output of the plain pipeline with the methods of `METHODS[label]`."""
    return accelerated(pipeline(model), METHODS[label])


def accelerated(pipe, methods, steps=5):
    """Return the output of a pipeline with these methods, which must accelerate something."""
    if methods:
        dit_accel.enable(pipe, **methods)
    try:
        made = sample(pipe, steps)
        if methods:
            dit_accel.summary(pipe, strict=True)
        return made
    finally:
        dit_accel.disable(pipe)


MODELS = ("tiny-sd3", "tiny-wan")


@pytest.fixture(scope="module", autouse=True)
def _free():
    yield
    pipeline.cache_clear()
    plain_pictures.cache_clear()


@pytest.mark.parametrize(
    ("model", "name", "least"),
    [
        ("tiny-sd3", "torchao:int8", 40),
        ("tiny-wan", "torchao:int8", 40),
        ("tiny-sd3", "torchao:int8_dynamic", 35),
        ("tiny-sd3", "torchao:float8", 30),
    ],
)
@pytest.mark.combines("sla", "ras partial", "ras forecast", "torchao:int8")
def test_pictures_of_a_quantised_transformer_are_near_the_plain_ones(model, name, least):
    pipe = pipeline(model, name)
    assert quantized_as(pipe.transformer) == name
    assert quantized_as(pipeline(model).transformer) is None
    kinds = {type(x.data).__name__ for x in pipe.transformer.parameters()}
    assert len(kinds) == 2  # quantised ones, and plain ones of norms and biases
    for label, methods in METHODS.items():
        pictures = plain_pictures(model, label), accelerated(pipe, methods)
        assert psnr(*pictures) > least, label
        assert not np.array_equal(*pictures), label


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.combines("sla and ras", "torchao:int8")
def test_both_methods_at_once(model):
    methods = {**METHODS["sla"], **METHODS["ras partial"]}
    pictures = [accelerated(pipeline(model, name), methods) for name in ("none", "torchao:int8")]
    assert psnr(*pictures) > 40


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.combines("few-step", "torchao:int8")
def test_few_steps(model):
    methods = {"sla": {**SLA, **SLAConfig.PRESETS["few-step"]}, "ras": "few-step"}
    pictures = []
    for name in ("none", "torchao:int8"):
        pipe = pipeline(model, name)
        dit_accel.enable(pipe, **methods)
        pictures.append(sample(pipe, 4))
        assert dit_accel.summary(pipe, strict=True).ras.forecast_steps == 1
        dit_accel.disable(pipe)
    assert psnr(*pictures) > 40


def test_every_name_is_a_config_of_torchao():
    module = importlib.import_module("torchao.quantization")
    assert all(hasattr(module, x) for x in QUANTIZED.values())


def test_fine_tuned_weights_are_refused():
    pipe = pipeline("tiny-wan", "torchao:int8")
    with pytest.raises(ValueError, match="quantised"), pytest.warns(UserWarning, match="quantised"):
        dit_accel.load_sla(pipe, asset("tiny-wan-sla"))


@pytest.mark.combines("sla", "torchao:int8", "LoRA")
def test_lora_goes_with_quantised_weights(tmp_path):
    pipe = load_pipeline("tiny-wan", sla=None, **loading_arguments("torchao:int8"))
    dit_accel.enable(pipe, **METHODS["sla"])
    before = sample(pipe, 2)
    width = pipe.transformer.blocks[0].attn1.to_q.in_features
    where = "transformer.blocks.1.attn1.to_v.lora"
    torch.manual_seed(0)
    weights = {
        f"{where}_A.weight": torch.randn(2, width),
        f"{where}_B.weight": torch.randn(width, 2),
    }
    save_file(weights, tmp_path / "style.safetensors")
    pipe.load_lora_weights(tmp_path / "style.safetensors", adapter_name="style")
    assert np.abs(sample(pipe, 2) - before).max() > 1e-3
    pipe.disable_lora()
    np.testing.assert_array_equal(sample(pipe, 2), before)


def small(out, *more):
    return [
        "--model", "tiny-sd3", "--height", 64, "--width", 64, "--num-inference-steps", 3,
        "--output-dir", out, *more,
    ]  # fmt: skip


def test_the_commands_quantise_and_note_it(tmp_path, capsys):
    more = ["--quantize", "torchao:int8", "--format", "json"]
    assert run("generate", "a red circle", *small(tmp_path / "one", *more)) == 0
    [record] = json.loads(capsys.readouterr().out)
    assert record["quantize"] == "torchao:int8"
    (tmp_path / "p.txt").write_text("a red circle\n")
    prompts = ["--prompts", tmp_path / "p.txt"]
    assert run("eval", "generate", *prompts, *small(tmp_path / "set", *more)) == 0
    capsys.readouterr()
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["acceleration"]["quantize"] == "torchao:int8"
    assert run("eval", "generate", *prompts, *small(tmp_path / "set")) == 2
    assert 'acceleration.quantize was "torchao:int8" and is null' in capsys.readouterr().err


@pytest.mark.parametrize("command", [["generate", "x"], ["compare", "x"], ["eval", "generate"]])
def test_other_names_are_refused_before_loading(command, tmp_path, capsys, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", loaded)
    for name in ("torchao:int4", "int8", "bitsandbytes:nf4", ""):
        assert run(*command, *small(tmp_path / "out", "--quantize", name)) == 2
        error = capsys.readouterr().err
        assert f"error: quantize={name!r}: " in error
        assert "torchao:int8, " in error
    assert not (tmp_path / "out").exists()


def test_without_torchao_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("generate", "x", *small(tmp_path, "--quantize", "torchao:int8")) == 1
    assert "pip install 'dit-accel[quant]'" in capsys.readouterr().err
