"""Sampling and evaluation of pipelines with two transformers (Wan2.2) and of VACE."""

import copy
import json

import pytest
import torch

import dit_accel
from dit_accel.eval.runs.caches import CACHES
from dit_accel.eval.runs.match import counted_cost
from dit_accel.finetune.families import family_name, trainable_of
from dit_accel.sampling.acceleration import accelerated, acceleration_settings, weights_sha256
from dit_accel.sampling.load import load_pipeline
from dit_accel.sampling.outline import read_outline
from dit_accel.sampling.step_caches import step_cache

from ..cli.command import SMALL, run
from ..tiny_wan import random_wan

PARTIAL = "ras:\n  ratio: 0.5\n  warmup: 1\n  tail: 0\n  resets: []\n"
SPARSE = "sla:\n  topk: 0.5\n  block_q: 16\n  block_k: 16\n  crossover: never\n  dense_steps: 0\n"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    from diffusers import WanPipeline

    folder, parts = tmp_path_factory.mktemp("wan22"), random_wan()
    second = copy.deepcopy(parts["transformer"])
    with torch.no_grad():
        for x in second.parameters():
            x.mul_(1.1)
    WanPipeline(**parts, transformer_2=second, boundary_ratio=0.8).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(SPARSE + PARTIAL)
    return path


@pytest.fixture
def pipe(repository):
    pipe = load_pipeline(repository, sla=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_generate_accelerates_both(repository, settings, tmp_path, capsys):
    out = tmp_path / "out"
    call = [
        "generate",
        "a red circle",
        "--model",
        repository,
        *SMALL,
        "--num-inference-steps",
        8,
        "--output-dir",
        out,
    ]
    assert run(*call, "--sla", settings, "--ras", settings, "--save-focus") == 0
    assert "both transformers: density 0." in capsys.readouterr().out
    sidecar = json.loads((out / "0000.json").read_text())
    acceleration = sidecar["acceleration"]
    parts = acceleration["transformers"]
    assert list(parts) == ["transformer", "transformer_2"]
    assert all(x["sparse_calls"] > 0 and x["ras"]["ras_steps"] > 0 for x in parts.values())
    assert len(acceleration["ras"]["steps"]) == 8
    assert {"text", "denoise", "decode", "total"} == set(sidecar["seconds"])
    assert (out / "0000-focus.png").exists()


def test_focus_masks_are_those_of_the_whole_run(pipe):
    from dit_accel.sampling.focus import focus_masks

    ras = {"ratio": 0.5, "warmup": 1, "tail": 0, "resets": []}
    dit_accel.enable(pipe, ras=ras)
    pipe(
        "a red circle",
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=8,
        output_type="latent",
    )
    steps = dit_accel.summary(pipe, strict=True).ras.steps
    assert list(focus_masks(pipe)) == [x.step for x in steps if x.mode == "partial"]
    assert max(focus_masks(pipe)) == 7


def test_the_settings_of_the_repository_are_found(repository, tmp_path, pipe):
    dit_accel.enable(pipe, sla={"transformer": {"topk": 0.4}})
    pipe.save_pretrained(tmp_path / "saved")
    out = tmp_path / "out"
    call = ["generate", "a red circle", "--model", tmp_path / "saved", *SMALL, "--output-dir", out]
    assert run(*call, "--crossover", "never") == 0
    parts = json.loads((out / "0000.json").read_text())["acceleration"]["transformers"]
    assert parts["transformer"]["config"]["topk"] == 0.4
    assert parts["transformer"]["config"]["crossover"] == "never"
    assert parts["transformer_2"]["config"] == {}


def test_records_tell_the_settings_of_both(pipe):
    with accelerated(pipe, sla="fast", ras="balanced"):
        found = acceleration_settings(pipe)
        assert found["sla"]["topk"] == 0.15
    with accelerated(pipe, sla={"transformer": "fast"}):
        found = acceleration_settings(pipe)
        assert found["sla"]["transformer"]["topk"] == 0.15
        assert found["sla"]["transformer_2"] is None
        assert found["ras"] is None
        with (
            pytest.raises(ValueError, match="sla, ras: "),
            accelerated(pipe, sla="fast"),
        ):
            pass
    with (
        accelerated(pipe, sla={"transformer_2": "fast"}),
        pytest.raises(ValueError, match="sla, ras: "),
        accelerated(pipe, ras="fast"),
    ):
        pass
    before = weights_sha256(pipe)
    with torch.no_grad():
        pipe.transformer_2.blocks[0].attn1.to_v.weight.add_(1)
    assert weights_sha256(pipe) != before


def test_cost_is_that_of_both(pipe):
    def call():
        size = {"height": 32, "width": 32, "num_frames": 5}
        pipe("a red circle", **size, num_inference_steps=6, output_type="latent")

    dense = counted_cost(pipe, call)
    first = int((pipe.scheduler.timesteps >= 800).sum())
    one = copy.copy(pipe)
    one.transformer_2 = None
    one.register_to_config(boundary_ratio=None)
    assert dense == pytest.approx(
        counted_cost(
            one,
            lambda: one(
                "a red circle",
                height=32,
                width=32,
                num_frames=5,
                num_inference_steps=6,
                output_type="latent",
            ),
        )
    )
    assert 0 < first < 6


def test_step_caches_and_lora_are_refused_by_name(repository, pipe, tmp_path, capsys):
    from diffusers import FirstBlockCacheConfig

    outline = read_outline(repository)
    for cache in CACHES.values():
        for target in (pipe, outline):
            assert "two transformers" in cache.why_not(target)
    config = FirstBlockCacheConfig(threshold=0.1)
    with pytest.raises(ValueError, match="two transformers"), step_cache(pipe, config):
        pass
    call = ["generate", "a red circle", "--model", repository, "--output-dir", tmp_path / "out"]
    assert run(*call, "--lora", tmp_path / "x.safetensors") == 2
    assert "two transformers (Wan2.2)" in capsys.readouterr().err


def test_fine_tuning_is_refused_by_name(repository, pipe, tmp_path):
    with pytest.raises(ValueError, match=r"model.*two transformers"):
        family_name(read_outline(repository), "model")
    with pytest.raises(ValueError, match=r"transformer_2.*two transformers"):
        trainable_of(pipe)
    index = json.loads((repository / "model_index.json").read_text())
    for name in ("vae", "transformer"):
        (tmp_path / name).symlink_to(repository / name)
    index |= {"transformer_2": [None, None], "expand_timesteps": True}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expand_timesteps"):
        family_name(read_outline(tmp_path), "model")
    (tmp_path / "model_index.json").write_text(
        json.dumps(index | {"_class_name": "WanVACEPipeline"})
    )
    with pytest.raises(ValueError, match=r"model.*WanVACEPipeline"):
        family_name(read_outline(tmp_path), "model")


def test_vace_takes_one_prompt_in_a_call(tmp_path, settings, capsys):
    from diffusers import WanVACEPipeline, WanVACETransformer3DModel

    parts = random_wan()
    torch.manual_seed(0)
    # Control: twice the latents, and the mask, of which each latent position has 8 x 8 values.
    config = dict(parts["transformer"].config) | {"vace_layers": [0, 2], "vace_in_channels": 72}
    parts["transformer"] = WanVACETransformer3DModel.from_config(config)
    WanVACEPipeline(**parts).save_pretrained(tmp_path / "vace")
    out = tmp_path / "out"
    call = ["generate", "a red circle", "--model", tmp_path / "vace", *SMALL, "--output-dir", out]
    assert run(*call, "--sla", settings) == 0
    record = json.loads((out / "0000.json").read_text())
    assert record["acceleration"]["sparse_calls"] > 0
