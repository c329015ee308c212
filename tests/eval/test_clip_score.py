"""CLIPScore on a tiny model of random weights: values, truncation, weights files."""

import json
import types

import numpy as np
import pytest
import torch

from dit_accel.eval.metrics.clip_score import ClipScore


@pytest.fixture(scope="module")
def clip(clip_folder):
    return ClipScore(clip_folder)


@pytest.fixture
def folder(clip_folder):
    return clip_folder


@pytest.fixture
def pictures(rng):
    return [rng.integers(0, 256, (40, 56, 3), dtype=np.uint8) for _ in range(3)]


PROMPTS = ["a red circle", "a blue square", "the red"]


def scored(clip, pictures, prompts=PROMPTS):
    return clip([clip.prepare(x) for x in pictures], prompts)


def test_score_is_that_of_torchmetrics(clip, folder, pictures):
    """Through a callable, with a model that answers as torchmetrics expects it."""
    from torchmetrics.functional.multimodal import clip_score
    from transformers import CLIPProcessor

    def embeddings(name):
        def of(*args):
            return getattr(clip.model, name)(*args).pooler_output

        return of

    model = types.SimpleNamespace(
        config=clip.model.config,
        get_image_features=embeddings("get_image_features"),
        get_text_features=embeddings("get_text_features"),
    )
    model.to = lambda device: model
    processor = CLIPProcessor(clip.processor, clip.tokenizer)
    images = [torch.from_numpy(x).permute(2, 0, 1) for x in pictures]
    theirs = [
        clip_score([image], [prompt], lambda: (model, processor)).item()
        for image, prompt in zip(images, PROMPTS, strict=True)
    ]
    assert max(theirs) > 10 > min(theirs)  # the last one is negative, so 0
    assert scored(clip, pictures) == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_batches_change_nothing(clip, pictures):
    alone = [scored(clip, [a], [b])[0] for a, b in zip(pictures, PROMPTS, strict=True)]
    assert scored(clip, pictures) == pytest.approx(alone, rel=1e-4, abs=1e-4)


def test_long_prompts_are_cut_and_told(clip, pictures):
    long = "red circle on the blue square"  # a token a letter
    assert clip.truncated(["a red", long]) == [False, True]
    scores = scored(clip, pictures[:1] * 2, [long, long + " moving"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    assert scores[0] > 0


def test_model_is_named_by_its_folder_and_its_weights(clip, folder):
    import hashlib

    assert clip.record["id"] == "tiny-clip"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert clip.record["sha256"] == digest


def test_models_without_safetensors_are_refused(folder, tmp_path):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"clip=.*copy.*safetensors"):
        ClipScore(copy)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ValueError, match=r"clip='.*CLIP model"):
        ClipScore(tmp_path)
    with pytest.raises(ValueError, match=r"clip='nobody/nothing'"):
        ClipScore("nobody/nothing")


def test_a_checkpoint_in_half_precision_is_run_in_full(folder, tmp_path, pictures):
    import shutil

    from transformers import CLIPModel

    half = tmp_path / "half"
    shutil.copytree(folder, half)
    CLIPModel.from_pretrained(folder).to(torch.bfloat16).save_pretrained(half)
    clip = ClipScore(half)
    assert {x.dtype for x in clip.model.parameters()} == {torch.float32}
    wide = CLIPModel.from_pretrained(folder).to(torch.bfloat16).float().eval()
    pixels = torch.stack([clip.prepare(x) for x in pictures])
    with torch.no_grad():
        expected = wide.get_image_features(pixel_values=pixels).pooler_output
    found = clip.model.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
