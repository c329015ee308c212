"""The embedded, trained image models."""

import json

import diffusers
import pytest
import torch

from dit_accel.demo import IMAGE_SAMPLING, SAMPLING, default_sampling
from dit_accel.demo.report import clip_batches, judged_clips, score_clips
from dit_accel.files import asset
from dit_accel.sampling.outline import read_outline
from dit_accel.sampling.settings import Sampling

SIDES = {"tiny-sd3": 64, "tiny-lumina2": 128}
# Text lengths that hold the prompts, the system prompt included where there is one.
LENGTHS = {"tiny-sd3": (16, 256), "tiny-lumina2": (64, 256)}


@pytest.fixture(scope="module", params=SIDES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipe(name):
    pipe = diffusers.DiffusionPipeline.from_pretrained(asset(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("split", "length"), [("train", 0), ("heldout", 1)], ids=["short text", "default text"]
)
def test_the_dense_model_shows_what_was_asked(pipe, name, split, length):
    asked = judged_clips(split, 4, still=True)
    sampling = default_sampling(pipe) | {"max_sequence_length": LENGTHS[name][length]}
    sampling["num_inference_steps"] = 12
    [stills] = clip_batches(pipe, asked.captions(with_motion=False), Sampling(**sampling))
    assert stills.shape == (4, 3, 1, SIDES[name], SIDES[name])
    assert sum(r["right"]["all"] for r in score_clips(stills, asked, still=True)) >= 3


def test_the_same_seed_gives_the_same_still_in_any_batch(pipe, name):
    prompts = ["a red circle on a navy background", "a white cross on a teal background"]
    sampling = Sampling(**default_sampling(pipe)).overridden(
        num_inference_steps=3, max_sequence_length=LENGTHS[name][0]
    )
    [both] = clip_batches(pipe, prompts, sampling, seed=5)
    [one] = clip_batches(pipe, prompts[1:], sampling, seed=6)
    torch.testing.assert_close(both[1:], one, atol=1e-3, rtol=0)


def test_a_still_has_256_image_tokens(pipe):
    assert pipe.transformer.config.patch_size == 1
    assert pipe.default_sample_size**2 == 256
    assert pipe.scheduler.config.shift == 3.0


def test_sampling_arguments_are_those_of_the_model(pipe, name):
    size = {"height": SIDES[name], "width": SIDES[name]}
    assert default_sampling(pipe) == IMAGE_SAMPLING | size
    assert default_sampling(read_outline(asset(name))) == IMAGE_SAMPLING | size
    assert default_sampling(read_outline(asset("tiny-wan"))) == SAMPLING


def test_the_repository_is_small_fp16_and_free_of_paths(name):
    from safetensors import safe_open

    folder = asset(name)
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 8e6
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    for path in folder.rglob("*.json"):
        assert "_name_or_path" not in path.read_text()


def test_the_judges_report_meets_its_bounds(name):
    report = json.loads(asset(f"{name}-judge.json").read_text())
    seen, held_out = report["summary"]["train"], report["summary"]["heldout"]
    assert seen["all"]["count"] == 288
    assert held_out["all"]["count"] == 96
    assert held_out["background"]["count"] == 96
    assert seen["all"]["rate"] >= 0.97
    assert held_out["all"]["rate"] >= 0.90
