"""The data that a config names."""

from types import SimpleNamespace

import pytest

from dit_accel.finetune.data import open as module
from dit_accel.finetune.data.captions import read_captions
from dit_accel.finetune.data.encode import size_rules
from dit_accel.finetune.data.open import open_samples
from dit_accel.finetune.data.precompute import precompute
from dit_accel.finetune.data.raw import RawSamples
from dit_accel.finetune.data.samples import Samples, load_batch
from dit_accel.finetune.data.sources import find_sources, size_choice

from .fakes import FakeModel
from .test_from_prompts import Wan

DEFAULTS = {
    "pretrained_model_name_or_path": "repository",
    "instance_data_dir": None,
    "precomputed_dir": None,
    "prompts": None,
    "num_teacher_samples": None,
    "teacher_num_inference_steps": None,
    "teacher_guidance_scale": None,
    "caption_column": "text",
    "video_column": "file_name",
    "height": None,
    "width": None,
    "num_frames": None,
    "fps": None,
    "buckets": None,
    "max_sequence_length": None,
    "seed": 0,
    "train_batch_size": 2,
}


def config(tmp_path, **changes):
    return SimpleNamespace(**DEFAULTS | {"output_dir": str(tmp_path / "run")} | changes)


def opened(tmp_path, model, **changes):
    return open_samples(config(tmp_path, **changes), model, progress=False)


@pytest.fixture
def precomputed(tmp_path, dataset, model):
    sizes = size_choice(size_rules(model))
    sources, _ = find_sources(read_captions(dataset(2)), sizes)
    return str(precompute(model, sources, sizes, tmp_path / "out").folder)


def test_a_folder_of_files(tmp_path, dataset, model):
    samples = opened(tmp_path, model, instance_data_dir=str(dataset(3)), num_frames=5, fps=5)
    assert isinstance(samples, RawSamples)
    assert isinstance(samples, Samples)
    assert samples.buckets == ["5x48x64"] * 3
    assert load_batch(samples, [0, 2]).latents.shape == (2, *model.latent_shape(48, 64, 5))


def test_options_reach_the_files(tmp_path, dataset, model):
    folder = dataset(2)
    table = folder / "captions.jsonl"
    table.write_text(
        table.read_text().replace('"text"', '"caption"').replace('"file_name"', '"path"')
    )
    options = {
        "instance_data_dir": str(folder),
        "caption_column": "caption",
        "video_column": "path",
    }
    assert opened(tmp_path, model, **options, buckets="5,32,32").buckets == ["5x32x32"] * 2
    with pytest.raises(ValueError, match=r"'text'.*--caption_column"):
        opened(tmp_path, model, instance_data_dir=str(folder), video_column="path")
    with pytest.raises(ValueError, match="instance_data_dir='none'"):
        opened(tmp_path, model, instance_data_dir="none")


def test_a_precomputed_folder(tmp_path, model, precomputed):
    samples = opened(tmp_path, model, precomputed_dir=precomputed)
    assert isinstance(samples, Samples)
    assert samples.buckets == ["9x48x64"] * 2
    with pytest.raises(ValueError, match=r"max_sequence_length=7: .* None text tokens"):
        opened(tmp_path, model, precomputed_dir=precomputed, max_sequence_length=7)
    with pytest.raises(ValueError, match=r"precomputed_dir=.*another model .*text_encoder"):
        opened(tmp_path, FakeModel(seed=4), precomputed_dir=precomputed)


def test_latents_of_another_geometry_are_refused(tmp_path, model, precomputed):
    model.latent_shape = lambda *_: (16, 3, 6, 8)
    message = r"precomputed_dir=.*latents of 9x48x64 .*\[3, 3, 6, 8\].*\[16, 3, 6, 8\]"
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, model, precomputed_dir=precomputed)
    model.frames_rule = (0, 1)
    with pytest.raises(ValueError, match=r"precomputed_dir='.*': .*frames 9 of 9x48x64 must be 1"):
        opened(tmp_path, model, precomputed_dir=precomputed)


@pytest.mark.parametrize(
    "given", [{}, {"prompts": "smoke", "instance_data_dir": "x"}], ids=["none", "two"]
)
def test_one_source_is_needed(tmp_path, model, given):
    with pytest.raises(
        ValueError, match=r"instance_data_dir=.*, precomputed_dir=None, prompts=.*one"
    ):
        opened(tmp_path, model, **given)


def test_prompts(tmp_path, wan, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    options = {"prompts": str(tmp_path / "prompts.txt"), "teacher_num_inference_steps": 1}
    options |= {"height": 32, "width": 32, "num_frames": 5, "seed": 3}
    samples = opened(tmp_path, Wan(wan), **options, num_teacher_samples=3)
    assert samples.buckets == ["5x32x32"] * 3
    assert (tmp_path / "run" / module.TEACHER_FOLDER / "manifest.json").is_file()
    assert [x["source"]["seed"] for x in samples.contents.samples.values()] == [3, 4, 5]


class Sampled(Exception):
    """Height, width and num_frames that would be sampled."""


@pytest.fixture
def size_of(monkeypatch, tmp_path):
    def noted(*_, sampling, **__):
        raise Sampled(sampling.height, sampling.width, sampling.num_frames)

    monkeypatch.setattr("dit_accel.finetune.data.from_prompts.teacher_samples", noted)

    def size(model, **options):
        with pytest.raises(Sampled) as found:
            opened(tmp_path, model, prompts="smoke", **options)
        return found.value.args

    return size


def test_sizes_that_are_not_given_are_those_of_the_model(size_of, wan, sd3):
    assert size_of(Wan(wan)) == (480, 832, 81)
    assert size_of(Wan(wan), num_frames=5) == (480, 832, 5)
    assert size_of(Wan(wan), pretrained_model_name_or_path="tiny-wan", height=32) == (32, 64, 33)
    images = Wan(sd3)
    images.frames_rule = (0, 1)
    side = sd3.default_sample_size * sd3.vae_scale_factor
    assert size_of(images) == (side, side, None)
    assert size_of(images, pretrained_model_name_or_path="tiny-sd3") == (64, 64, None)
    assert size_of(images, num_frames=1, height=32, width=64) == (32, 64, None)
