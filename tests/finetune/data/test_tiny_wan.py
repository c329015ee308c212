"""The three sources of data with the embedded model: one seed, one loss, whatever they come from."""

import contextlib

import pytest
import torch

from dit_accel.demo import make_data
from dit_accel.finetune.data.captions import read_captions
from dit_accel.finetune.data.open import open_samples
from dit_accel.finetune.data.order import Order
from dit_accel.finetune.data.precompute import precompute
from dit_accel.finetune.data.samples import load_batch
from dit_accel.finetune.data.sources import find_sources, size_choice

families = pytest.importorskip("dit_accel.finetune.families")


@pytest.fixture(scope="module")
def trainable():
    from dit_accel.sampling.load import load_pipeline

    return families.trainable_of(load_pipeline("tiny-wan", sla=None))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("clips") / "data", 4, num_frames=9, progress=False)


def config(tmp_path, **options):
    from dit_accel.finetune.config import FinetuneConfig

    return FinetuneConfig(output_dir=str(tmp_path / "run"), train_batch_size=2, **options)


def velocity(trainable, batch):
    """Prediction of the model on noised samples of a batch."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch.latents.shape, generator=generator)
    sigmas = torch.full((len(batch),), 0.5)
    with torch.no_grad():
        return trainable.velocity(
            trainable.transformer, (batch.latents + noise) / 2, sigmas, batch.conditions
        ) - (noise - batch.latents)


def test_raw_and_precomputed_samples_are_the_same(tmp_path, trainable, clips):
    pytest.importorskip("dit_accel.finetune.config")
    from dit_accel.finetune.data.encode import size_rules

    sizes = size_choice(size_rules(trainable))
    sources, _ = find_sources(read_captions(clips), sizes)
    precompute(trainable, sources, sizes, tmp_path / "out")
    raw = open_samples(config(tmp_path, instance_data_dir=str(clips)), trainable, progress=False)
    made = open_samples(
        config(tmp_path, precomputed_dir=str(tmp_path / "out")), trainable, progress=False
    )
    assert list(raw.ids) == list(made.ids)
    assert list(raw.buckets) == list(made.buckets) == ["9x64x64"] * 4
    indices = Order(raw.buckets, 2, 0).batch(0)
    a, b = load_batch(raw, indices), load_batch(made, indices)
    assert torch.equal(a.latents, b.latents)
    assert all(torch.equal(a.conditions[k], b.conditions[k]) for k in a.conditions)
    assert a.latents.shape == (2, *trainable.latent_shape(64, 64, 9))
    # The model was trained on such clips: it predicts their velocity far better than zero does.
    error = velocity(trainable, b).square().mean()
    assert error < 0.6


@pytest.mark.parametrize("place", ["inside of autocast", "outside of autocast"])
def test_raw_and_precomputed_samples_are_the_same_in_bf16(tmp_path, clips, place):
    """Text encoders compute in bf16, the VAE in fp32, wherever training asks for a sample."""
    from dit_accel.cli import main
    from dit_accel.finetune.engine import Engine
    from dit_accel.finetune.model import load_model

    folder = tmp_path / "out"
    size = ["--num-frames", "5", "--height", "32", "--width", "32"]
    main(["precompute", "--data-dir", str(clips), "--output-dir", str(folder), "--device", "cpu",
          "--dtype", "bf16", *size])  # fmt: skip
    options = {"mixed_precision": "bf16", "device": "cpu", "report_to": "none"}
    sizes = {"num_frames": 5, "height": 32, "width": 32}
    settings = config(tmp_path, instance_data_dir=str(clips), **sizes, **options)
    engine = Engine(settings, tmp_path)
    trainable = families.trainable_of(load_model(settings, engine.device))
    raw = open_samples(settings, trainable, progress=False)
    made = open_samples(
        config(tmp_path, precomputed_dir=str(folder), **options), trainable, progress=False
    )
    with contextlib.ExitStack() as stack:
        if place.startswith("inside"):
            stack.enter_context(engine.accelerator.autocast())
        latents, conditions = raw.sample(1)
        null = trainable.encode_null()
    expected = made.sample(1)
    assert torch.equal(latents, expected[0])
    assert latents.dtype == torch.float32
    assert all(torch.equal(x, expected[1][name]) for name, x in conditions.items())
    assert {x.dtype for x in conditions.values()} == {x.dtype for x in null.values()}
    assert {x.dtype for x in conditions.values()} == {torch.bfloat16}


def test_latents_from_prompts_are_as_good(tmp_path, trainable):
    pytest.importorskip("dit_accel.finetune.config")
    options = {"prompts": "demo", "num_teacher_samples": 2, "teacher_num_inference_steps": 6}
    samples = open_samples(
        config(tmp_path, **options, height=64, width=64, num_frames=9), trainable, progress=False
    )
    assert list(samples.buckets) == ["9x64x64"] * 2
    batch = load_batch(samples, [0, 1])
    assert batch.latents.shape == (2, *trainable.latent_shape(64, 64, 9))
    assert velocity(trainable, batch).square().mean() < 0.6
