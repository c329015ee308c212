"""The option `--sla` with SLA checkpoints."""

import json
import shutil

import pytest

from dit_accel import SparseWanPipeline, save_sla

from .command import SMALL, run

SLA = {"topk": 0.5, "block_q": 16, "block_k": 16, "combine": "proj", "dense_steps": 0}


@pytest.fixture
def checkpoint(wan_repository, tmp_path):
    pipe = SparseWanPipeline.from_pretrained(wan_repository, sla={**SLA, "crossover": "never"})
    save_sla(pipe, tmp_path / "sla")
    return tmp_path / "sla"


def config(out):
    record = sorted(out.glob("*.json"))[-1]
    return json.loads(record.read_text())["acceleration"]["config"]


def test_generate_and_compare_run_with_an_sla_checkpoint(
    wan_repository, checkpoint, tmp_path, capsys
):
    common = ["a red circle", "--model", wan_repository, *SMALL, "--sla", checkpoint]
    assert run("generate", *common, "--kind", "png", "--output-dir", tmp_path / "a") == 0
    assert config(tmp_path / "a")["combine"] == "proj"
    assert config(tmp_path / "a")["crossover"] == "never"
    options = ["--crossover", "auto", "--output-dir", tmp_path / "b"]
    assert run("compare", *common, *options) == 0
    compared = json.loads((tmp_path / "b/results.json").read_text())["rows"][-1]["settings"]["sla"]
    assert compared["combine"] == "proj"
    assert compared["crossover"] == "auto"
    capsys.readouterr()
    assert run("generate", *common, "--topk", "0.1", "--output-dir", tmp_path / "c") == 2
    assert "topk=0.1: " in capsys.readouterr().err
    (checkpoint / "sla.safetensors").write_bytes(b"")
    assert run("generate", *common, "--output-dir", tmp_path / "c") == 2
    assert "sla.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_a_repository_with_an_sla_checkpoint_runs_with_it(wan_repository, checkpoint, tmp_path):
    model = shutil.copytree(wan_repository, tmp_path / "model")
    common = ["generate", "a red circle", "--model", model, *SMALL, "--kind", "png"]
    assert run(*common, "--output-dir", tmp_path / "plain") == 0
    assert config(tmp_path / "plain")["combine"] == "shared_softmax"
    shutil.copy(checkpoint / "sla.safetensors", model)
    assert run(*common, "--output-dir", tmp_path / "own") == 0
    assert config(tmp_path / "own")["combine"] == "proj"
    assert run(*common, "--sla", "fast", "--output-dir", tmp_path / "fast") == 0
    assert config(tmp_path / "fast")["topk"] == 0.15
