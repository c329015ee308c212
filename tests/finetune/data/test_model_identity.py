"""Recognising the model that samples were made with."""

import json

import pytest
import torch

from dit_accel.finetune.data.model_identity import model_differences, model_identity, model_label

from .fakes import FakeModel, FakeVae


def test_one_model_in_several_dtypes():
    made = model_identity(FakeModel().pipe)
    assert json.loads(json.dumps(made)) == made
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        pipe = FakeModel().pipe
        for part in (pipe.vae, pipe.text_encoder):
            part.to(dtype)
        assert model_differences(made, model_identity(pipe)) == []
        assert model_differences(model_identity(pipe), made) == []


def test_other_models():
    made = model_identity(FakeModel().pipe)
    assert model_differences(made, model_identity(FakeModel(seed=1).pipe)) == [
        "text_encoder has other weights",
        "vae has other weights",
    ]
    assert model_differences(made, model_identity(FakeModel(scaling_factor=2.0).pipe)) == [
        "vae has another configuration"
    ]
    pipe = FakeModel().pipe
    with torch.no_grad():
        pipe.vae.weight.mul_(1.03)  # a fine-tuned one
    assert model_differences(made, model_identity(pipe)) == ["vae has other weights"]
    pipe.components["vae"] = pipe.vae = torch.nn.Linear(7, 40)
    pipe.vae.config = {}
    assert model_differences(made, model_identity(pipe)) == ["vae is a Linear, not a FakeVae"]


def test_the_transformer_counts_where_it_makes_latents():
    pipe = FakeModel().pipe
    pipe.transformer = FakeVae(5)
    made = model_identity(pipe, transformer=True)
    assert model_differences(made, model_identity(pipe)) == []
    pipe.transformer = FakeVae(6)
    assert model_differences(made, model_identity(pipe, transformer=True)) == [
        "transformer has other weights"
    ]


def test_parts_that_are_not_there_are_not_compared():
    pipe = FakeModel().pipe
    made = model_identity(pipe)
    pipe.text_encoder = pipe.components["text_encoder"] = None
    assert model_differences(made, model_identity(pipe)) == []


@pytest.mark.parametrize(
    ("path", "name", "revision"),
    [
        ("/home/me/my-model", "my-model", ""),
        (f"/c/models--org--name/snapshots/{'ab' * 20}", "org/name", "ab" * 20),
    ],
)
def test_names_tell_nothing_about_the_machine(path, name, revision):
    pipe = FakeModel().pipe
    pipe.config = {"_name_or_path": path}
    identity = model_identity(pipe)
    assert (identity["model"], identity["revision"]) == (name, revision)
    assert model_label(identity) == name + (f" at {revision[:12]}" if revision else "")
    assert model_label({"model": "", "revision": ""}) == "unnamed model"
