"""Validation samples: dense and sparse side by side, from the same seeds."""

import dataclasses
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import dit_accel
from dit_accel.finetune.processes import Processes
from dit_accel.finetune.stop import CutShort
from dit_accel.finetune.validation import Validator
from dit_accel.finetune.validation_samples import (
    PSNR_OF_EQUAL,
    Made,
    compared,
    validation_prompts,
)
from dit_accel.sampling.image_files import read_image

SIZE = {"size": (9, 64, 64), "text_tokens": 16}
SPARSE = {
    "topk": 0.1,
    "block_q": 32,
    "block_k": 32,
    "crossover": "never",
    "combine": "none",
    "dense_steps": 0,
    "dense_layers": 0,
}


@dataclass(frozen=True)
class Config:
    validation_prompts: str = "a red circle:::a blue square"
    num_validation_videos: int = 1
    validation_num_inference_steps: int | None = 1
    validation_guidance_scale: float | None = 2.0
    targets: str = "mixed"
    fps: float | None = None
    seed: int = 4


@pytest.fixture
def pipe(sparse_wan):
    return sparse_wan(sla=None)


def validated(pipe, config, folder, size=SIZE):
    validator = Validator(pipe, config, folder, **size)
    validator.make_references()
    dit_accel.enable(pipe, sla=SPARSE)
    return validator, validator.run("distillation-000000")


def test_files_and_metrics(pipe, tmp_path):
    _, means = validated(pipe, Config(), tmp_path)
    assert set(means) == {"psnr", "ssim", "latent_error", "density"}
    assert 0 < means["latent_error"] < 1
    assert means["psnr"] < PSNR_OF_EQUAL
    assert 0.1 <= means["density"] < 0.4
    assert not pipe.transformer.training
    found = sorted(str(x.relative_to(tmp_path)) for x in tmp_path.rglob("*") if x.is_file())
    here, dense = "validation/distillation-000000", "validation/dense"
    assert found == [
        *(f"{dense}/0000{i}.{kind}" for i in range(2) for kind in ("mp4", "safetensors")),
        f"{dense}/settings.json",
        *(f"{here}/0000{i}-{kind}.mp4" for i in range(2) for kind in ("side_by_side", "sparse")),
        f"{here}/metrics.json",
    ]
    record = json.loads((tmp_path / here / "metrics.json").read_text())
    assert record["mean"] == means
    assert list(record["samples"]) == ["00000", "00001"]
    assert np.mean([x["psnr"] for x in record["samples"].values()]) == means["psnr"]


def test_everything_read_exactly_is_dense(pipe, tmp_path):
    validator = Validator(pipe, Config(validation_prompts="a red circle"), tmp_path, **SIZE)
    validator.make_references()
    dit_accel.enable(pipe, sla=SPARSE | {"topk": 1.0})
    means = validator.run("x")
    assert means["density"] == 1
    assert means["latent_error"] < 1e-4
    assert means["psnr"] > 50


def test_references_are_kept_over_a_resume(pipe, tmp_path, monkeypatch):
    config = Config(validation_prompts="a red circle")
    _, means = validated(pipe, config, tmp_path)
    dit_accel.disable(pipe)
    again = Validator(pipe, config, tmp_path, **SIZE)
    monkeypatch.setattr(Validator, "_make", lambda *_: pytest.fail("made again"))
    again.make_references()
    monkeypatch.undo()
    dit_accel.enable(pipe, sla=SPARSE)
    assert again.run("y") == means


@pytest.mark.parametrize("change", ["prompt", "seed", "weights", "file"])
def test_references_of_other_settings_are_made_again(pipe, tmp_path, change):
    config = Config(validation_prompts="a red circle")
    Validator(pipe, config, tmp_path, **SIZE).make_references()
    if change == "prompt":
        config = dataclasses.replace(config, validation_prompts="a blue square")
    elif change == "seed":
        config = dataclasses.replace(config, seed=9)
    elif change == "weights":
        with torch.no_grad():
            pipe.transformer.blocks[0].attn1.to_v.weight.mul_(-1)
    else:
        path = tmp_path / "validation/dense/00000.safetensors"
        path.write_bytes(path.read_bytes()[:-9])
    made = []
    validator = Validator(pipe, config, tmp_path, **SIZE)
    make, validator._make = validator._make, lambda sample: made.append(sample) or make(sample)
    validator.make_references()
    assert len(made) == 1


def test_images(sd3, tmp_path):
    config = Config(
        validation_prompts="a red circle",
    )
    try:
        _, means = validated(sd3, config, tmp_path, {"size": (1, 64, 64), "text_tokens": 32})
    finally:
        dit_accel.disable(sd3)
    assert means["latent_error"] > 0
    assert read_image(tmp_path / "validation/dense/00000.png").shape == (64, 64, 3)


def test_several_samples_a_prompt_have_seeds_of_their_own(pipe, tmp_path):
    config = Config(validation_prompts="a red circle", num_validation_videos=2)
    validator = Validator(pipe, config, tmp_path, **SIZE)
    assert [x.seed for x in validator.samples] == [4, 5]


def test_guided_targets_are_sampled_without_guidance(pipe, tmp_path):
    config = Config(targets="guided", validation_guidance_scale=None)
    [sample, _] = Validator(pipe, config, tmp_path, **SIZE).samples
    assert sample.sampling.guidance_scale == 1


def test_signal_cuts_it_short(pipe, tmp_path):
    stopped = []
    config = Config(validation_num_inference_steps=2)
    validator = Validator(pipe, config, tmp_path, **SIZE, stopping=lambda: bool(stopped))
    validator.make_references()
    run = pipe.transformer.register_forward_hook(lambda *_: stopped.append(1))
    with pytest.raises(CutShort):
        validator.run("x")
    run.remove()
    assert len(stopped) == 2  # the two calls of the first step
    assert not (tmp_path / "validation/x/metrics.json").exists()


class OneOfTwo(Processes):
    """The first of two processes; the other one fails at the collective call of this number."""

    def __init__(self, at):
        super().__init__()
        self.count, self.calls, self.at = 2, 0, at

    def sum(self, values):
        return values

    def barrier(self):
        pass

    def gather(self, value):
        if isinstance(value, dict):
            return [value]
        self.calls += 1
        failure = ("OSError", "No space left on device") if self.calls == self.at else None
        return [value, (None, failure)]


@pytest.mark.parametrize("at", [1, 2])
def test_full_disk_of_another_process_ends_this_one_too(pipe, tmp_path, at):
    """1: while a sample is written; 2: while the record is written."""
    validator = Validator(pipe, Config(), tmp_path, **SIZE, processes=OneOfTwo(at))
    with pytest.raises((OSError, RuntimeError), match="process 1: No space left on device"):
        validator.make_references()
    validator.processes.at = 0
    validator.make_references()
    dit_accel.enable(pipe, sla=SPARSE)
    validator.processes.at = validator.processes.calls + at
    with pytest.raises((OSError, RuntimeError), match="process 1: No space left on device"):
        validator.run("x")


def test_bad_size_is_refused_before_anything_runs(pipe, tmp_path):
    with pytest.raises(ValueError, match="num_frames=10"):
        Validator(pipe, Config(), tmp_path, size=(10, 64, 64), text_tokens=16)


def test_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo\n")
    assert [x.prompt for x in validation_prompts(str(path))] == ["one", "two"]
    assert [x.prompt for x in validation_prompts(" one ::: two")] == ["one", "two"]
    with pytest.raises(ValueError, match=r"validation_prompts='one:::': .*empty"):
        validation_prompts("one:::")
    with pytest.raises(ValueError, match=r"'missing.txt'"):
        validation_prompts("missing.txt")


def test_equal_samples():
    pictures = np.zeros((1, 16, 16, 3), np.uint8)
    made = Made(pictures, torch.ones(2, 4, 4), None)
    assert compared(made, made) == {"psnr": PSNR_OF_EQUAL, "ssim": 1.0, "latent_error": 0.0}
