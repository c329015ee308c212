"""Codebooks that fit what a model computes: k-means, capture, errors and the command."""

import itertools
import json
import re

import pytest
import torch
import transformers

from dit_accel import llm
from dit_accel.llm.kvcache.calibrate import (
    CalibrationSettings,
    calibrate,
    captured,
    errors,
    frequencies_of,
)
from dit_accel.llm.kvcache.codebooks import read_codebooks, write_codebooks
from dit_accel.llm.kvcache.kmeans import kmeans
from dit_accel.llm.kvcache.quantizer import nearest
from dit_accel.llm.kvcache.rotation import Rotation

from ...cli.command import run
from ..models import BASE, make, prompt

FAST = {"rounds": 3, "sink": 4, "length": 256}


def squared_error(x, centroids):
    index = nearest(x, centroids)[..., None].expand(-1, -1, x.shape[2])
    return (x - centroids.gather(1, index)).square().sum(-1).mean()


def test_kmeans_finds_clusters_apart():
    torch.manual_seed(0)
    centres = 50 * torch.randn(3, 8, 2)
    x = (centres[:, :, None] + torch.randn(3, 8, 100, 2)).flatten(1, 2)
    found = kmeans(x, 8, rounds=10)
    assert squared_error(x, found) < 2.2  # that of the clusters themselves is 2
    assert torch.equal(found, kmeans(x, 8, rounds=10))


@pytest.mark.parametrize("different", [1, 5, 16])
def test_kmeans_of_few_different_vectors_is_exact(different):
    torch.manual_seed(0)
    x = torch.randn(2, different, 3)[:, torch.arange(60) % different]
    assert squared_error(x, kmeans(x, 16, rounds=5)) == 0


def test_kmeans_leaves_no_centroid_without_vectors():
    x = torch.cat([torch.zeros(1, 900, 1), torch.arange(100.0).view(1, 100, 1)], 1)
    codes = nearest(x, kmeans(x, 20, rounds=10))
    assert len(codes.unique()) == 20


@pytest.mark.parametrize("scope", ["model", "layer", "head"])
@pytest.mark.parametrize(
    "form", [{}, {"pairing": "planes", "centred": True}, {"pairing": "planes", "rope": "before"}]
)
def test_codebooks_beat_random_ones_and_fit_the_model(scope, form):
    model = make("Llama")
    samples = [prompt(rows=1, length=256, seed=i) for i in range(3)]
    settings = CalibrationSettings(**FAST, scope=scope, **form)
    found = calibrate(model, samples[:2], samples[2:], settings, name="tiny")
    assert (found.model, found.layers) == ("tiny", (0, 1, 2))
    assert found.form.scope == scope
    assert 0 < found.notes["errors"]["keys"] < 0.25
    assert 0 < found.notes["errors"]["values"] < 0.25
    rotation = found.rotation(torch.device("cpu"))
    assert found.notes["errors"] == errors(found, captured(model, samples[2:], 4, rotation))


def test_more_bits_have_smaller_errors():
    # With few different tokens, the values of the first layer would be few and exact.
    model = make("Llama", vocab_size=3000, num_hidden_layers=1)
    samples = list(torch.randint(3, 3000, (5, 1, 256), generator=torch.Generator().manual_seed(0)))
    found = [
        calibrate(model, samples[:4], samples[4:], CalibrationSettings(**FAST, bits=bits)).notes
        for bits in (2, 3, 4)
    ]
    for name in ("keys", "values"):
        assert all(y["errors"][name] < x["errors"][name] for x, y in itertools.pairwise(found))


def test_keys_are_those_after_rope_without_the_first():
    model, ids = make("Llama"), prompt(rows=1, length=30)
    found = captured(model, [ids, ids], 10)
    cache = model(ids, use_cache=True).past_key_values
    k, v = found[1]
    assert torch.equal(k, torch.cat(2 * [cache.layers[1].keys[0, :, 10:]], 1))
    assert torch.equal(v, torch.cat(2 * [cache.layers[1].values[0, :, 10:]], 1))


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_keys_before_rope_are_those_of_the_projection(family):
    model, ids, seen = make(family), prompt(rows=1, length=30), []
    layer = model.model.layers[1].self_attn
    last = layer.k_norm if family == "Qwen3" else layer.k_proj
    handle = last.register_forward_hook(lambda _, __, out: seen.append(out.reshape(30, 2, 16)))
    rotation = Rotation(frequencies_of(model, 16))
    found = captured(model, [ids], 10, rotation)
    handle.remove()
    torch.testing.assert_close(found[1][0], seen[0][10:].transpose(0, 1))


@pytest.mark.parametrize("family", ["Gemma3", "SmolLM3", "Ernie4_5"])
def test_models_that_rotate_otherwise_are_refused(family):
    """Layers with other frequencies, without any, and neighbouring channels that turn together."""
    if family == "Ernie4_5":
        torch.manual_seed(0)
        model = transformers.Ernie4_5ForCausalLM(transformers.Ernie4_5Config(**BASE)).eval()
    else:
        model = make(family, **({"num_hidden_layers": 4} if family == "SmolLM3" else {}))
    ids = prompt(rows=1, length=64)
    settings = CalibrationSettings(**FAST, pairing="planes", rope="before")
    with pytest.raises(ValueError, match="rope='before'"):
        calibrate(model, [ids], [ids], settings)


def test_layers_with_windows_have_no_codebooks():
    model = make("Gemma3")
    samples = [prompt(rows=1, length=64, seed=i) for i in range(2)]
    found = calibrate(model, samples[:1], samples[1:], CalibrationSettings(**FAST, rope="after"))
    assert found.layers == (1, 2)


def test_generate_with_the_file(tmp_path):
    model, ids = make("Llama"), prompt(length=100)
    samples = [ids[:1], ids[1:]]
    books = calibrate(model, samples, samples, CalibrationSettings(**FAST))
    path = tmp_path / "pq.safetensors"
    write_codebooks(path, books)
    kv = {"store": "pq", "store_options": {"codebooks": str(path)}, "sink": 4, "recent": 8}
    want = model(ids).logits[:, -1]
    llm.enable(model, kv=kv)
    with pytest.raises(ValueError, match=r"model: .*disable"):
        captured(model, samples, 4)
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    found = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
    assert cache.layers[0].stored == 87
    assert (found - want).norm() / want.norm() < 0.1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 5}, "bits=5"),
        ({"scope": "mush"}, "scope='mush'"),
        ({"pairing": "mush"}, "pairing='mush'"),
        ({"rope": "mush"}, "rope='mush'"),
        ({"length": 20}, "length=20"),
        ({"samples": 0}, "samples=0"),
        ({"checks": 0}, "checks=0"),
        ({"rounds": 0}, "rounds=0"),
        ({"sink": 2048}, "sink=2048"),
        ({"seed": -1}, "seed=-1"),
        ({"texts": ()}, "texts"),
    ],
)
def test_settings(values, message):
    with pytest.raises(ValueError, match=message):
        CalibrationSettings(**values)


def test_heads_that_cannot_be_divided():
    model = make("Llama", head_dim=12)
    with pytest.raises(ValueError, match=r"bits=2.*head_dim=12\b.*\b8\b"):
        calibrate(model, [], [], CalibrationSettings(bits=2))


def command(model, *more):
    small = ("--length", 256, "--samples", 1, "--rounds", 2, "--scope", "model")
    return ("llm", "calibrate", "--model", model, *small, *more)


def test_the_command_writes_codebooks(small_llama, tmp_path, capsys):
    path = tmp_path / "new" / "pq.safetensors"
    assert run(*command(small_llama, "--output", path, "--bits", 2)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.search(r"^2 bits.* keys 0\.\d+, values 0\.\d+$", lines[0])
    assert lines[1] == str(path)
    books = read_codebooks(path)
    assert (books.form.sub_vectors, books.form.bits, books.form.scope) == (4, 8, "model")
    llm.enable(
        make("Llama", vocab_size=259),
        kv={"store": "pq", "store_options": {"codebooks": str(path)}},
    )
    assert run(*command(small_llama, "--output", path)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(*command(small_llama, "--output", path, "--overwrite", "--format", "json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["settings"]["bits"] == 4
    assert result["bytes"] == path.stat().st_size
    assert [x.name for x in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output", "x.json"), "output='x.json'"),
        (("--length", 10), "length=10"),
        (("--length", 600), "length: 600 tokens"),
        (("--texts", "none.txt", "--length", 300), "text='none.txt'"),
        (("--device", "abacus"), "device='abacus'"),
        (("--output", "taken.safetensors", "--overwrite"), "output='taken.safetensors'"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    refused, small_llama, arguments, message, tmp_path
):
    (tmp_path / "taken.safetensors").write_text("mine")
    assert message in refused("calibrate", "--model", small_llama, *arguments)


def test_codebooks_of_other_weights_are_refused(tmp_path):
    model, other = make("Llama"), make("Llama")
    samples = [prompt(rows=1, length=64, seed=i) for i in range(2)]
    path = tmp_path / "pq.safetensors"
    write_codebooks(path, calibrate(model, samples[:1], samples[1:], CalibrationSettings(**FAST)))
    kv = {"store": "pq", "store_options": {"codebooks": str(path)}}
    llm.enable(model, kv=kv)
    with torch.no_grad():
        for x in other.parameters():
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(7)))
    with pytest.raises(ValueError, match=r"codebooks=.*weights"):
        llm.enable(other, kv=kv)
