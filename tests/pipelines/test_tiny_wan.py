"""The embedded trained model."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dit_accel import SparseWanPipeline
from dit_accel.checkpoint.file import FILE_NAME, read_checkpoint
from dit_accel.demo import SAMPLING
from dit_accel.files import asset


@pytest.fixture(scope="module")
def pipe():
    pipe = SparseWanPipeline.from_pretrained(asset("tiny-wan"), sla=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def frames(pipe):
    def run(**changed):
        arguments = {**SAMPLING, "num_inference_steps": 4, "max_sequence_length": 16, **changed}
        generator = torch.Generator().manual_seed(0)
        prompt = "a red circle moving right"
        return pipe(prompt, generator=generator, output_type="np", **arguments).frames

    return run


def test_topk_one_equals_dense_and_disable_restores_exactly(pipe, frames):
    dense = frames(num_inference_steps=2)
    pipe.enable(sla={"topk": 1.0, "crossover": "never"})
    sparse = frames(num_inference_steps=2)
    assert pipe.summary(strict=True).density == 1.0
    pipe.disable()
    np.testing.assert_allclose(sparse, dense, atol=1e-5)
    np.testing.assert_array_equal(frames(num_inference_steps=2), dense)


def test_balanced_runs_every_scheduled_layer_sparse_below_a_third(pipe, frames):
    pipe.enable(sla={"crossover": "never"})
    frames()
    report = pipe.summary(strict=True)
    pipe.disable()
    assert [x.sparse_calls > 0 for x in report.layers] == [x.scheduled for x in report.layers]
    assert report.density <= 0.3


def test_the_dense_model_shows_what_was_asked(frames):
    from dit_accel.demo import judge_clips
    from dit_accel.demo.vocabulary import COLOURS, MOTIONS, SHAPES

    video = torch.from_numpy(frames(num_inference_steps=12)).permute(0, 4, 1, 2, 3) * 2 - 1
    seen = judge_clips(video)
    words = (SHAPES[seen.shape[0]], COLOURS[seen.colour[0]], MOTIONS[seen.motion[0]])
    assert words == ("circle", "red", "moving right")


def test_the_repository_is_small_fp16_and_free_of_paths():
    from safetensors import safe_open

    folder = asset("tiny-wan")
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 12e6
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    for path in folder.rglob("*.json"):
        assert "_name_or_path" not in path.read_text()


def test_the_judges_report_meets_its_bounds():
    report = json.loads(asset("tiny-wan-judge.json").read_text())
    seen, held_out = report["summary"]["train"], report["summary"]["heldout"]
    assert seen["colour"]["count"] + held_out["colour"]["count"] >= 384
    assert seen["colour"]["rate"] >= 0.95
    assert seen["motion"]["rate"] >= 0.95
    assert seen["shape"]["rate"] >= 0.92
    assert held_out["all"]["rate"] >= 0.80


def test_the_fine_tuned_model_is_nearer_to_dense_at_the_same_sparsity(pipe, frames):
    def error(sla):
        pipe.enable(sla=sla)
        video = frames(num_inference_steps=12)
        density = pipe.summary(strict=True).density
        pipe.disable()
        return float(np.square(video - dense).mean()), density

    folder = asset("tiny-wan-sla")
    settings = read_checkpoint(folder / FILE_NAME).config
    dense, short = frames(num_inference_steps=12), frames(num_inference_steps=2)
    tuned, density = error(folder)
    untuned, same = error(replace(settings, router="spread"))
    assert density == same < 0.11
    assert tuned < untuned / 4
    np.testing.assert_array_equal(frames(num_inference_steps=2), short)  # the base model is back
