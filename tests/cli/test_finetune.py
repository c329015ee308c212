"""`dit-accel finetune`: recipes, overrides, dry runs, and what it refuses before a model is loaded."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from dit_accel.cli.finetune import with_recipe
from dit_accel.finetune.recipe import load_config

from .command import run

ROOT = Path(__file__).parents[2]
TINY = ["--config", "tiny-wan-sla"]


@pytest.fixture
def trained(monkeypatch):
    """The configs that training was called with; nothing is trained."""
    import types

    found = []
    module = types.ModuleType("dit_accel.finetune.trainer")

    def finetune(config, *, progress=True):
        found.append(config)
        return Path(config.output_dir)

    module.finetune = finetune
    monkeypatch.setitem(sys.modules, "dit_accel.finetune.trainer", module)
    return found


def test_without_options_the_default_recipe_is_trained(trained, capsys):
    assert run("finetune") == 0
    assert trained == [load_config("tiny-wan-sla")]
    assert capsys.readouterr().out == "tiny-wan-sla\n"


def test_options_override_the_recipe_with_dashes_or_underscores(trained):
    assert run("finetune", *TINY, "--max_train_steps", 7, "--learning-rate", "3e-4",
               "--sla.topk", 0.05, "--sla.dense_layers", 0, 3, "--train=lora", "--no-use-ema") == 0  # fmt: skip
    changed = {"max_train_steps": 7, "learning_rate": 3e-4, "train": "lora"}
    sla = {"topk": 0.05, "dense_layers": (0, 3)}
    assert trained == [load_config("tiny-wan-sla", {**changed, "sla": sla})]
    assert trained[0].sla["combine"] == load_config("tiny-wan-sla").sla["combine"]


def test_another_source_of_data_replaces_that_of_the_recipe(trained, tmp_path):
    assert (
        run("finetune", *TINY, "--instance_data_dir", tmp_path, "--caption-column", "caption") == 0
    )
    config = trained[0]
    assert (config.instance_data_dir, config.prompts) == (str(tmp_path), None)
    assert config.num_teacher_samples is None
    assert run("finetune", *TINY, "--precomputed_dir", tmp_path) == 0
    assert trained[1].sizes == [(None, None, None)]


def test_a_recipe_of_ones_own_and_json(trained, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 7\nprompts: demo\noutput_dir: there\n")
    assert run("finetune", f"--config={path}", "--format", "json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["output_dir"] == "there"
    assert printed["config"] == trained[0].to_dict()
    assert trained[0].seed == 7


def test_help_shows_the_values_of_the_recipe(capsys):
    assert run("finetune", "--config", "sd3-sla", "--help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    config = load_config("sd3-sla")
    assert f"(default: {config.pretrained_model_name_or_path})" in text
    assert f"(default: {config.rank})" in text


def test_every_option_of_the_config_is_on_the_command_line(capsys):
    import dataclasses

    from dit_accel.config import SLAConfig
    from dit_accel.finetune.config import FinetuneConfig

    assert run("finetune", "--help") == 0
    options = set(re.findall(r"--([\w.-]+)", capsys.readouterr().out))
    names = {x.name for x in dataclasses.fields(FinetuneConfig)} - {"sla"}
    names |= {f"sla.{x.name}" for x in dataclasses.fields(SLAConfig)}
    assert {x.replace("_", "-") for x in names} <= options


def test_a_dry_run_prints_what_would_happen_and_loads_nothing(capsys, tmp_path, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", loaded)
    monkeypatch.setattr("diffusers.ModelMixin.from_pretrained", loaded)
    monkeypatch.chdir(tmp_path)
    options = ("--sla.combine", "proj", "--router", "fixed", "--max-train-steps", 9)
    assert run("finetune", *TINY, "--dry-run", *options) == 0
    text = capsys.readouterr().out
    for expected in (
        "  max_train_steps: 9\n",
        "    combine: proj\n",
        "  weights            57",
        "  sla                10",
        "of 1,506,888 train",
        "steps: distillation 9, with 4 samples each",
        "data: 32 samples, frames x height x width 33x64x64",
    ):
        assert expected in text
    assert re.search(r"^  activations +0\.\d{3} GiB$", text, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_as_json(capsys):
    assert (
        run(
            "finetune",
            *TINY,
            "--dry_run",
            "--format",
            "json",
            "--train",
            "lora",
            "--rank",
            4,
            "--num-frames",
            5,
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["train"] == "lora"
    assert [x["name"] for x in found["groups"]] == ["weights", "sla"]
    assert found["groups"][0]["values"] == 5 * 2 * 4 * 2 * 4 * 128
    memory = found["memory_bytes"]
    assert memory["gradients"] == 4 * sum(x["values"] for x in found["groups"])
    assert memory["teacher"] == 0
    assert memory["total"] == sum(x for name, x in memory.items() if name != "total")
    assert found["steps"] == {"distillation": 240}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--config", "tiny-wan-slo"], "config='tiny-wan-slo': "),
        (["--learning-rate", "-1"], "learning_rate=-1.0: "),
        (["--sla.topk", "2"], "sla.topk=2: "),
        (["--train", "sla", "--router", "fixed"], "train='sla': "),
        (["--config", "sd3-sla", "--dry-run", "--pretrained-model-name-or-path", "tiny-wan"],
         "family='sd3': "),
        (["--dry-run", "--pretrained-model-name-or-path", "nowhere"], "model='nowhere': "),
        (["--dry-run", "--height", "50"], "height=50: "),
        (["--dry-run", "--prompts", "nowhere.txt"], "prompts='nowhere.txt': "),
        (["--loss", "diffusion", "--targets", "guided", "--guidance-scale", "3"], "targets='guided'"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_in_one_line(arguments, line, refused):
    assert refused("finetune", *arguments).startswith(f"error: {line}")


def test_an_unknown_option_is_refused_with_a_suggestion(capsys):
    assert run("finetune", "--learning-ratte", "3") == 2
    assert "--learning-rate" in capsys.readouterr().err


def test_the_recipe_is_found_among_the_arguments():
    for arguments in (
        ["finetune", "--config", "sd3-sla"],
        ["finetune", "--seed", "1", "--config=sd3-sla"],
    ):
        command = with_recipe(arguments)
        assert (command.config, command.options.family) == ("sd3-sla", "sd3")
    assert with_recipe(["finetune"]).config == "tiny-wan-sla"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dry-run", "--config", "sd3-sla", "--pretrained-model-name-or-path", "tiny-sd3"],
        ["--learning-rate", "-1"],
        ["--learning-ratte", "1"],
    ],
    ids=["dry run", "refused", "unknown"],
)
def test_the_module_is_the_command(arguments, monkeypatch, capsys):
    """Output, messages and exit codes are the same."""
    monkeypatch.setattr(sys, "argv", ["finetune", *arguments])
    code = 0
    try:
        runpy.run_module("dit_accel.finetune", run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    module = capsys.readouterr()
    assert run("finetune", *arguments) == code == (0 if "--dry-run" in arguments else 2)
    command = capsys.readouterr()
    assert (module.out, module.err) == (command.out, command.err)
    assert module.out if "--dry-run" in arguments else module.err


def test_the_module_runs_as_a_process():
    done = subprocess.run(
        [sys.executable, "-m", "dit_accel.finetune", "--learning-rate", "-1"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert "learning_rate=-1.0" in done.stderr


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("run_1gpu.sh", "-m dit_accel.finetune --config tiny-wan-sla --seed 3"),
        (
            "run_8gpu.sh",
            "-m torch.distributed.run --standalone --nproc-per-node 8 -m dit_accel.finetune "
            "--config tiny-wan-sla --seed 3",
        ),
    ],
)
def test_launch_scripts(script, expected):
    path = ROOT / "finetune" / script
    assert os.access(path, os.X_OK)

    def call(*arguments, **environment):
        return subprocess.run(
            ["bash", str(path), *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": os.environ["PATH"], "PYTHON": "echo", **environment},
        )

    assert call("tiny-wan-sla", "--seed", "3").stdout == f"{expected}\n"
    assert "usage: " in call().stderr
    assert call().returncode
    two = call("tiny-wan-sla", GPUS="2").stdout
    assert ("--nproc-per-node 2 " in two) == (script == "run_8gpu.sh")
