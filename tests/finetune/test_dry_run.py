"""Dry runs: sizes, samples, batch and memory of what would be trained."""

import pytest
import torch

from dit_accel.files import asset
from dit_accel.finetune.config import FinetuneConfig
from dit_accel.finetune.dry_run import complete_sizes, dry_run, encoder_bytes
from dit_accel.finetune.model import load_model
from dit_accel.finetune.trainer import check_before_loading
from dit_accel.sampling.outline import read_outline


@pytest.fixture(scope="module")
def outlines():
    return {name: read_outline(asset(name)) for name in ("tiny-wan", "tiny-sd3")}


def test_encoders_take_what_they_take_when_they_are_loaded(wan):
    source = wan.config._name_or_path
    text, vae = (sum(x.numel() for x in part.parameters()) for part in (wan.text_encoder, wan.vae))
    assert encoder_bytes(source, FinetuneConfig()) == 4 * text + 4 * vae
    # Training loads the VAE in fp32 whatever it computes in.
    half = FinetuneConfig(mixed_precision="bf16", pretrained_model_name_or_path=str(source))
    assert encoder_bytes(source, half) == 2 * text + 4 * vae
    loaded = load_model(half, torch.device("cpu"))
    parts = (loaded.text_encoder, loaded.vae)
    held = sum(x.numel() * x.element_size() for part in parts for x in part.parameters())
    assert held == encoder_bytes(source, half)


def test_the_hub_is_asked_for_one_revision_in_one_cache(monkeypatch):
    """Checks, dry runs and loading find the same files."""

    class Asked(Exception):
        pass

    def asked(model, *_, **hub):
        raise Asked(model, hub)

    given = {"pretrained_model_name_or_path": "owner/model", "prompts": "demo"}
    config = FinetuneConfig(**given, revision="v1", cache_dir="here")
    plain = FinetuneConfig(**given)
    monkeypatch.setattr("dit_accel.sampling.outline.read_outline", asked)
    monkeypatch.setattr("dit_accel.finetune.trainer.read_outline", asked)
    monkeypatch.setattr("dit_accel.finetune.model.pipeline_class", asked)
    for call in (dry_run, check_before_loading, lambda x: load_model(x, torch.device("cpu"))):
        with pytest.raises(Asked) as error:
            call(config)
        assert error.value.args == ("owner/model", {"revision": "v1", "cache_dir": "here"})
        with pytest.raises(Asked) as error:
            call(plain)
        assert error.value.args == ("owner/model", {})


def test_sizes_of_the_pipeline_fill_the_gaps(outlines, wan_repository):
    wan = outlines["tiny-wan"]
    assert complete_sizes(FinetuneConfig(), wan) == [(33, 64, 64)]
    named = FinetuneConfig(pretrained_model_name_or_path="owner/wan", height=320, width=320)
    assert complete_sizes(named, wan) == [(81, 320, 320)]
    buckets = FinetuneConfig(buckets="33,64,64;17,96,64")
    assert complete_sizes(buckets, wan) == [(33, 64, 64), (17, 96, 64)]
    tiny = FinetuneConfig(pretrained_model_name_or_path="tiny-sd3")
    assert complete_sizes(tiny, outlines["tiny-sd3"]) == [(1, 64, 64)]
    named = FinetuneConfig(pretrained_model_name_or_path="owner/sd3")
    side = (
        outlines["tiny-sd3"].transformer.config.sample_size * outlines["tiny-sd3"].vae_scale_factor
    )
    assert complete_sizes(named, outlines["tiny-sd3"]) == [(1, side, side)]


def test_the_largest_bucket_decides_on_the_memory():
    def activations(buckets):
        return dry_run(FinetuneConfig(buckets=buckets)).memory.activations

    large = activations("33,64,64")
    assert activations("5,64,64;33,64,64;17,64,64") == large
    assert activations("5,64,64") < 0.5 * large


def test_processes_and_accumulation_make_the_batch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = FinetuneConfig(
        train_batch_size=3,
        gradient_accumulation_steps=2,
        fsdp=True,
        stages=("regression", "distillation"),
        regression_steps=7,
        max_train_steps=9,
        sla={"combine": "proj"},
    )
    found = dry_run(config)
    assert (found.batch, found.processes) == (4 * 3 * 2, 4)
    assert found.steps == {"regression": 7, "distillation": 9}
    alone = dry_run(FinetuneConfig(train_batch_size=3, sla={"combine": "proj"}))
    assert found.memory.gradients == alone.memory.gradients // 4


def test_samples_of_prompts(tmp_path):
    prompts = tmp_path / "three.txt"
    prompts.write_text("a\nb\nc\n")
    assert dry_run(FinetuneConfig(prompts=str(prompts))).samples == 3
    assert dry_run(FinetuneConfig(prompts=str(prompts), num_teacher_samples=8)).samples == 8
    assert dry_run(FinetuneConfig()).samples is None
    assert "data: none given" in str(dry_run(FinetuneConfig()))


def test_samples_of_a_folder(tmp_path):
    pytest.importorskip("dit_accel.finetune.data.captions")
    from PIL import Image

    for i in range(2):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a red circle")
    config = FinetuneConfig(
        pretrained_model_name_or_path="tiny-sd3", instance_data_dir=str(tmp_path), train="lora"
    )
    found = dry_run(config)
    assert found.samples == 2
    assert "data: 2 samples, " in str(found)
    assert "1x64x64" in str(found)
    assert found.own_sizes


def test_samples_and_sizes_of_precomputed_data(tmp_path, monkeypatch):
    store = pytest.importorskip("dit_accel.finetune.data.store")
    from types import SimpleNamespace

    buckets = ["17x64x64", "33x64x64", "17x64x64"]
    monkeypatch.setattr(store, "open_store", lambda folder: SimpleNamespace(buckets=buckets))
    found = dry_run(FinetuneConfig(precomputed_dir=str(tmp_path)))
    assert (found.samples, found.sizes) == (3, [(17, 64, 64), (33, 64, 64)])
    assert found.memory.encoders == 0
    shown = FinetuneConfig(precomputed_dir=str(tmp_path), validation_prompts="a red circle")
    assert dry_run(shown).memory.encoders > 0
