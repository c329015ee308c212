"""The SLA checkpoint: what is written comes back, and everything else is refused, each with its reason."""

import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dit_accel import SLAConfig
from dit_accel.checkpoint.base_model import FINGERPRINT, BaseModel, LayerGeometry
from dit_accel.checkpoint.file import (
    SLACheckpoint,
    digest,
    read_checkpoint,
    settings_of,
    write_checkpoint,
)

LAYERS = (LayerGeometry("blocks.0.attn1", 4, 2, 8), LayerGeometry("blocks.1.attn1", 2, 2, 16))


def make(seed=0, **settings):
    config = SLAConfig(**{"combine": "proj", **settings})
    generator = torch.Generator().manual_seed(seed)
    base = BaseModel(
        transformer_class="WanTransformer3DModel",
        layers=LAYERS,
        fingerprint=torch.randn(2, 64, generator=generator),
        model="org/model",
        revision="abc",
    )
    weights = {}
    for layer in LAYERS if config.has_weights else ():
        shapes = {
            "proj_l.weight": (layer.head_dim, layer.head_dim),
            "proj_l.bias": (layer.head_dim,),
        }
        if config.combine == "alpha":
            shapes = {"alpha_logit": (layer.heads,)}
        for name, shape in shapes.items():
            weights[f"{layer.name}.{name}"] = torch.randn(shape, generator=generator)
    return SLACheckpoint(config=config, base=base, weights=weights)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "sla.safetensors"
    write_checkpoint(path, make())
    return path


def forge(path, header=(), tensors=(), seal=True):
    """Changes entries (None: removes them) and makes the digest fit again."""
    with safe_open(path, framework="pt") as file:
        entries = dict(file.metadata())
        data = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    for target, changes in ((entries, dict(header)), (data, dict(tensors))):
        target.update(changes)
        for name in [name for name, x in changes.items() if x is None]:
            del target[name]
    if seal:
        entries["digest"] = digest(entries, data)
    save_file(data, path, metadata=entries)


@pytest.mark.parametrize(
    "settings",
    [
        {"topk": 0.1, "linear_scope": "all", "rounding": "floor"},
        {"combine": "alpha", "order": (4, 4, 4), "topk_by_layer": {-1: 0.5}, "dense_layers": [0]},
        {"combine": "shared_softmax"},
    ],
    ids=["proj", "alpha", "training-free"],
)
def test_what_is_written_comes_back(tmp_path, settings):
    checkpoint, path = make(**settings), tmp_path / "sla.safetensors"
    write_checkpoint(path, checkpoint)
    found = read_checkpoint(path)
    assert found.config == checkpoint.config
    assert found.weights.keys() == checkpoint.weights.keys()
    assert all(torch.equal(found.weights[name], x) for name, x in checkpoint.weights.items())
    assert torch.equal(found.base.fingerprint, checkpoint.base.fingerprint)
    for field in ("transformer_class", "layers", "model", "revision"):
        assert getattr(found.base, field) == getattr(checkpoint.base, field)
    assert path.stat().st_mode & 0o777 == 0o644
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        assert set(file.keys()) == {*checkpoint.weights, FINGERPRINT}
    assert header["format"] == "dit_accel.sla"
    assert header["format_version"] == "1"
    assert json.loads(header["config"]) == json.loads(json.dumps(checkpoint.config.to_dict()))
    assert json.loads(header["layers"])[0] == ["blocks.0.attn1", 4, 2, 8]


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("dit_accel.checkpoint.file.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(path, make(seed=1))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["sla.safetensors"]


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Harmful(), protocol=4), "pickle"),
        (b"PK\3\4" + bytes(40), "zip.*torch.save"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"", "empty"),
        (b"\xff" * 64, "truncated|damaged"),
    ],
    ids=["pickle", "zip", "git-lfs", "html", "empty", "noise"],
)
def test_other_files_are_named(tmp_path, content, message):
    path = tmp_path / "sla.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


@pytest.mark.parametrize("size", [4, 8, 100, -1, -100])
def test_truncated_files_are_refused(path, size):
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"sla\.safetensors: .*damaged"):
        read_checkpoint(path)


def test_appended_bytes_are_refused(path):
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    with pytest.raises(ValueError, match=r"sla\.safetensors: .*damaged"):
        read_checkpoint(path)


def test_every_changed_byte_is_noticed(path):
    content = path.read_bytes()
    for place in (*range(0, len(content), 97), len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"sla\.safetensors: "):
            read_checkpoint(path)


@pytest.mark.parametrize("field", ["config", "layers", "transformer_class", "base_model"])
def test_a_changed_header_is_noticed(path, field):
    other = {"config": json.dumps(SLAConfig(combine="proj", topk=0.5).to_dict()), "layers": "[]"}
    forge(path, {field: other.get(field, "other")}, seal=False)
    with pytest.raises(ValueError, match=r"sla\.safetensors: .*digest"):
        read_checkpoint(path)


def _config(**changed):
    return {"config": json.dumps(SLAConfig(combine="proj").to_dict() | changed)}


def _layers(*second):
    return {"layers": json.dumps([["blocks.0.attn1", 4, 2, 8], list(second)])}


WEIGHT = "blocks.1.attn1.proj_l.weight"


@pytest.mark.parametrize(
    ("header", "tensors", "message"),
    [
        ({"format": "pt"}, {}, "format='pt'"),
        ({"format": None}, {}, "format=None"),
        ({"format_version": "3"}, {}, "format_version='3'.*'1'.*'2'"),
        ({"format_version": "2"}, {}, "no 'companion'"),
        ({"companion": "{}"}, {}, "companion.*format_version='1'"),
        ({"layers": None}, {}, "no 'layers'"),
        ({"config": "nonsense"}, {}, "Expecting value"),
        ({"config": "[]"}, {}, r"config: \[\]"),
        (_config(topc=0.5), {}, "unknown key 'topc'"),
        (_config(topk=2), {}, "topk=2"),
        (_config(topk=[]), {}, "topk="),
        (_config(dense_layers=3), {}, "dense_layers=3.* 2"),
        (_config(combine="alpha"), {}, "combine='alpha'.* blocks.0.attn1.alpha"),
        (_config(combine="none"), {}, "combine='none'.* blocks.0.attn1.proj_l.bias"),
        ({"layers": "[[0, 1]]"}, {}, r"layers: \[0, 1\].*\[name, heads, kv_heads, head_dim\]"),
        (_layers("blocks.0.attn1", 2, 2, 16), {}, "layers: .*same name"),
        (_layers("blocks.1.attn1", 2, 2, 10**9), {}, r"blocks.1.attn1: .*1000000000.*\[1, 1024\]"),
        (_layers("blocks.1.attn1", 3, 2, 16), {}, "blocks.1.attn1: .*3, 2, 16.*kv_heads"),
        (_layers("blocks.1.attn1", 2, True, 16), {}, "layers: .*True"),
        (_layers("blocks.1.attn1", 2, 2, 1000), {}, r"blocks.1.attn1.*\(1000,"),
        ({}, {WEIGHT: None}, f"missing: {WEIGHT}"),
        ({}, {"blocks.2.attn1.proj_l.bias": torch.zeros(16)}, "not expected: blocks.2"),
        ({}, {WEIGHT: torch.zeros(16, 8)}, rf"{WEIGHT} .*\(16, 8\).*\(16, 16\)"),
        ({}, {WEIGHT: torch.zeros(16, 16).half()}, f"{WEIGHT} .*float16.*float32"),
        ({}, {WEIGHT: torch.full((16, 16), torch.nan)}, f"{WEIGHT}: .*finite"),
        ({}, {FINGERPRINT: None}, "base.fingerprint: shape"),
        ({}, {FINGERPRINT: torch.zeros(3, 64)}, "base.fingerprint: shape"),
        ({}, {FINGERPRINT: torch.full((2, 64), torch.inf)}, "base.fingerprint: .*finite"),
    ],
)  # fmt: skip
def test_contradictions_are_named(unchecked, path, header, tensors, message):
    forge(path, header, tensors)
    with pytest.raises(ValueError, match=rf"sla\.safetensors: .*({message})"):
        read_checkpoint(path)


def test_a_wrong_sla_checkpoint_cannot_even_be_made():
    checkpoint = make()
    with pytest.raises(ValueError, match=r"missing: blocks\.0\.attn1\.proj_l\.bias"):
        SLACheckpoint(config=checkpoint.config, base=checkpoint.base, weights={})


def test_bases_are_compared_by_geometry_and_weights():
    base, other = make().base, make(seed=1).base
    base.check(base)
    with pytest.raises(ValueError, match=r"another base model \(org/model\): .*0\.9"):
        base.check(other)

    def changed(**fields):
        return BaseModel(**{**vars(base), **fields})

    base.check(changed(fingerprint=base.fingerprint.bfloat16().float(), model="", revision=""))
    with pytest.warns(UserWarning, match="cannot be checked"):
        base.check(changed(fingerprint=torch.zeros(2, 64)))  # unreadable there
    half = torch.stack([base.fingerprint[0], torch.zeros(64)])
    assert base.similarity(changed(fingerprint=half)) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"WanTransformer3DModel.*SD3"):
        base.check(changed(transformer_class="SD3"))
    with pytest.raises(ValueError, match=r"2 attention layers.* 1"):
        base.check(changed(layers=LAYERS[:1], fingerprint=base.fingerprint[:1]))
    wider = (LAYERS[0], LAYERS[1]._replace(head_dim=32))
    with pytest.raises(ValueError, match=r"head_dim 16.*head_dim 32"):
        base.check(changed(layers=wider))


def test_settings_are_a_preset_first_then_a_path(path, tmp_path, monkeypatch):
    for source in (path, path.parent, str(path.parent)):
        assert settings_of(source).config.combine == "proj"
    assert settings_of("fast") == SLAConfig.load("fast")
    assert settings_of({"topk": 0.5}) == SLAConfig(topk=0.5)
    yaml = tmp_path / "sla.yaml"
    yaml.write_text("sla:\n  topk: 0.5\n")
    assert settings_of(yaml) == SLAConfig(topk=0.5)
    (tmp_path / "fast").mkdir()
    monkeypatch.chdir(tmp_path)
    assert settings_of("fast") == SLAConfig.load("fast")
    with pytest.raises(ValueError, match=r"sla='.*fast': .*sla\.safetensors"):
        settings_of(tmp_path / "fast")
    with pytest.raises(ValueError, match=r"sla='fats': .*'fast'"):
        settings_of("fats")
