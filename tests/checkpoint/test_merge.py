"""`merge`: tuned weights become a plain diffusers repository with their SLA checkpoint, or nothing is written."""

import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from dit_accel import SparseWanPipeline, load_sla, save_sla
from dit_accel.checkpoint.file import read_checkpoint
from dit_accel.checkpoint.merge import merge
from dit_accel.checkpoint.save_load import weights_left_out

from ..cli.command import run as cli
from ..random_pipelines import make, run
from .test_save_load import STEPS, absent, tuned

PREFIXES = ("module.", "_orig_mod.", "model.module._orig_mod.", "transformer.")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan") / "base"
    make("wan").save_pretrained(folder)
    (folder / "README.md").write_text("About this model.")
    (folder / ".cache").mkdir()
    (folder / "sla.safetensors").write_bytes(b"made for other weights")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A fully tuned pipeline: its SLA checkpoint, its weights in several forms, and what it generates."""
    folder = tmp_path_factory.mktemp("trained")
    pipe, generator = tuned(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, x in pipe.transformer.named_parameters():
            if ".sla." not in name:
                x.add_(torch.randn(x.shape, generator=generator) * 0.02)
    save_sla(pipe, folder)
    save_file(pipe.transformer.state_dict(), folder / "with-sla.safetensors")
    with weights_left_out(pipe):
        save_file(pipe.transformer.state_dict(), folder / "plain.safetensors")
        pipe.transformer.save_pretrained(folder / "transformer")
        pipe.transformer.save_pretrained(folder / "sharded", max_shard_size="20KB")
        pipe.save_pretrained(folder / "pipeline")
        for prefix in PREFIXES:
            prefixed = {prefix + name: x for name, x in pipe.transformer.state_dict().items()}
            save_file(prefixed, folder / f"{prefix}safetensors")
    assert (folder / "sharded" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    return folder, run(pipe, "wan", steps=STEPS)


@pytest.mark.parametrize(
    "form",
    [
        "with-sla.safetensors",
        "plain.safetensors",
        "transformer",
        "sharded",
        "pipeline",
        *(f"{prefix}safetensors" for prefix in PREFIXES),
    ],
)
def test_the_merged_repository_is_the_tuned_pipeline(form, model, trained, tmp_path):
    folder, expected = trained
    out = merge(model, folder / form, tmp_path / "new" / "tuned-wan", sla_checkpoint=folder)
    if form in ("with-sla.safetensors", "pipeline"):
        pipe = SparseWanPipeline.from_pretrained(out, **absent("wan"))
        pipe.set_progress_bar_config(disable=True)
        assert torch.equal(run(pipe, "wan", steps=STEPS), expected)
        vanilla = diffusers.DiffusionPipeline.from_pretrained(out, **absent("wan"))
        vanilla.set_progress_bar_config(disable=True)
        load_sla(vanilla, out)
        assert torch.equal(run(vanilla, "wan", steps=STEPS), expected)
    # The other forms give the same weights, and so the same pipeline.
    merged = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    plain = load_file(folder / "plain.safetensors")
    assert merged.keys() == plain.keys()
    assert all(torch.equal(merged[name], x) for name, x in plain.items())
    stored, saved = (read_checkpoint(x / "sla.safetensors").weights for x in (out, folder))
    assert stored.keys() == saved.keys()
    assert all(torch.equal(stored[name], x) for name, x in saved.items())
    assert {p.name for p in out.iterdir()} == {p.name for p in model.iterdir()} - {".cache"}
    assert (out / "README.md").read_text() == "About this model."
    assert "_name_or_path" not in json.loads((out / "transformer" / "config.json").read_text())
    base = read_checkpoint(out / "sla.safetensors").base
    assert base.model == "tuned-wan"
    assert base.similarity(read_checkpoint(folder / "sla.safetensors").base) == pytest.approx(1)
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in out.rglob("*.safetensors"))
    assert [p.name for p in out.parent.iterdir()] == ["tuned-wan"]


def test_without_an_sla_checkpoint_there_is_none(model, trained, tmp_path):
    (tmp_path / "out").mkdir()
    out = merge(model, trained[0] / "plain.safetensors", tmp_path / "out")
    assert not (out / "sla.safetensors").exists()
    plain = load_file(trained[0] / "plain.safetensors")
    merged = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    assert merged.keys() == plain.keys()
    assert all(torch.equal(merged[name], x) for name, x in plain.items())


def changed(trained, path, **changes):
    """A copy of the tuned state dict with other entries (None: removes them)."""
    weights = load_file(trained / "with-sla.safetensors") | changes
    save_file({name: x for name, x in weights.items() if x is not None}, path)
    return path


def _other_config(trained, path):
    folder = shutil.copytree(trained / "transformer", path / "other")
    config = json.loads((folder / "config.json").read_text()) | {"eps": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _other_class(trained, path):
    make("sd3").transformer.save_pretrained(path / "sd3")
    return path / "sd3"


def _index(trained, path):
    folder = shutil.copytree(trained / "sharded", path / "shards")
    index = {"weight_map": {"a": "../plain.safetensors"}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _pickle(trained, path):
    torch.save({}, path / "weights.safetensors")
    return path / "weights.safetensors"


BIAS = "proj_out.bias"
SLA = "blocks.0.attn1.sla.proj_l.bias"
REFUSED = {
    "missing": (lambda t, p: changed(t, p / "x", **{BIAS: None}), f"missing: {BIAS}"),
    "extra": (lambda t, p: changed(t, p / "x", lora=torch.ones(1)), "not expected: lora"),
    "prefix": (
        lambda t, p: changed(t, p / "x", **{f"teacher.{BIAS}": torch.ones(1)}),
        f"prefix 'teacher' of teacher.{BIAS}",
    ),
    "twice": (
        lambda t, p: changed(t, p / "x", **{f"module.{BIAS}": torch.ones(16)}),
        f"{BIAS} .*twice.*module.{BIAS}",
    ),
    "shape": (
        lambda t, p: changed(t, p / "x", **{BIAS: torch.ones(3)}),
        r"proj_out.bias .*\(3,\).*\(16,\)",
    ),
    "integers": (
        lambda t, p: changed(t, p / "x", **{BIAS: torch.ones(16, dtype=torch.int8)}),
        "proj_out.bias is torch.int8",
    ),
    "sla missing": (
        lambda t, p: changed(t, p / "x", **{SLA: None}),
        r"sla_checkpoint: missing: blocks\.0\.attn1\.proj_l\.bias",
    ),
    "sla extra": (
        lambda t, p: changed(t, p / "x", **{"blocks.0.attn1.sla.more": torch.ones(1)}),
        r"sla_checkpoint: .*blocks\.0\.attn1\.more",
    ),
    "adapters": (
        lambda t, p: changed(t, p / "x", **{"proj_out.lora_A.weight": torch.ones(2, 16)}),
        "transformer=.*adapters",
    ),
    "config": (_other_config, "transformer=.*eps=0.5.*1e-06"),
    "class": (_other_class, "transformer=.*SD3Transformer2DModel.*WanTransformer3DModel"),
    "index": (_index, "transformer=.*'../plain.safetensors'"),
    "pickle": (_pickle, "weights.safetensors: .*zip"),
    "nothing": (lambda t, p: p / "no", "no: .*file"),
    "no weights": (lambda t, p: p, "transformer=.*config"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_do_not_fit_are_named_and_nothing_is_written(case, model, trained, tmp_path):
    make_weights, message = REFUSED[case]
    (tmp_path / "in").mkdir()
    weights = make_weights(trained[0], tmp_path / "in")
    with pytest.raises(ValueError, match=message):
        merge(model, weights, tmp_path / "out", sla_checkpoint=trained[0])
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_the_other_arguments_are_checked_too(model, trained, tmp_path):
    folder, out = trained[0], tmp_path / "out"
    weights = folder / "plain.safetensors"
    with pytest.raises(ValueError, match=r"^output_dir="):
        merge(model, weights, model)
    with pytest.raises(ValueError, match=r"^model='org/model'"):
        merge("org/model", weights, out)
    with pytest.raises(ValueError, match=r"^model=.*model_index\.json"):
        merge(folder, weights, out)
    with pytest.raises(ValueError, match=r"^transformer=.*\*\.sla\.\*.*sla_checkpoint"):
        merge(model, folder / "with-sla.safetensors", out)
    with pytest.raises(ValueError, match=r"sla\.safetensors: .*truncated"):
        merge(model, weights, out, sla_checkpoint=model)
    with pytest.raises(ValueError, match=r"sla\.safetensors: no such file"):
        merge(model, weights, out, sla_checkpoint=tmp_path)
    save_sla(tuned("lumina"), tmp_path / "lumina")
    with pytest.raises(ValueError, match=r"^sla_checkpoint=.*LuminaNextDiT2DModel"):
        merge(model, weights, out, sla_checkpoint=tmp_path / "lumina")
    for entry, value, message in (
        ("transformer_2", ["diffusers", "WanTransformer3DModel"], "has a transformer_2"),
        ("transformer", ["diffusers", "FluxTransformer2DModel"], "is a FluxTransformer2DModel"),
        ("transformer", None, "is a None"),
    ):
        other = shutil.copytree(model, tmp_path / message)
        index = json.loads((model / "model_index.json").read_text()) | {entry: value}
        (other / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=message):
            merge(other, weights, out)
    assert not out.exists()


def test_the_command_line(model, trained, tmp_path, capsys):
    folder, out = trained[0], tmp_path / "out"
    command = ["merge", "--model", model, "--transformer", folder / "transformer"]
    assert cli(*command, "--sla-checkpoint", folder, "--output-dir", out) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert (out / "sla.safetensors").is_file()
    assert cli(*command, "--sla-checkpoint", folder, "--output-dir", out) == 2
    assert f"output_dir='{out}'" in capsys.readouterr().err
    assert cli(*command, "--sla-checkpoint", model, "--output-dir", tmp_path / "new") == 2
    assert not (tmp_path / "new").exists()
