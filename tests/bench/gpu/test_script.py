"""`kernels/gpu_check.py` without a GPU, and as a process on a machine with few packages."""

import json

import pytest
import torch

from dit_accel.bench.gpu import command, compiling, speed
from dit_accel.bench.gpu.command import main, parse

from ...installed import BARE, ROOT, run_with

SCRIPT = ROOT / "kernels" / "gpu_check.py"


def run(*arguments):
    """Run the command in this process and return its exit status."""
    return main(parse(None, list(arguments)), str(SCRIPT))


def test_a_dry_run_with_few_packages_walks_every_step_and_compiles(tmp_path, capsys):
    """torch, triton, jaxtyping and numpy are enough."""
    options = ("--dry", "--dry-limit", "2", "--workers", "1", "--out", str(tmp_path))
    done = run_with(BARE, tmp_path / "site", str(SCRIPT), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 compiled" in done.stdout
    data = json.loads((tmp_path / "gpu_check.json").read_text())
    assert run("--list") == 0
    listed = capsys.readouterr().out.splitlines()
    assert {x.partition("  (")[0] for x in listed} == data["steps"].keys()
    assert {x["status"] for x in data["steps"].values()} == {"done"}
    text = (tmp_path / "gpu_check.md").read_text()
    assert "Dry run: nothing was measured" in text
    assert "## Bounds" in text


@pytest.mark.parametrize(
    "content", ['{"dry": false, "steps": {}}', "{"], ids=["measured", "broken"]
)
def test_a_dry_run_keeps_what_was_measured(content, tmp_path, capsys):
    path = tmp_path / "gpu_check.json"
    path.write_text(content)
    assert run("--dry", "--only", "none", "--dry-limit", "1", "--out", str(tmp_path)) == 2
    assert f"--out={tmp_path}" in capsys.readouterr().out
    assert path.read_text() == content


def test_a_bare_machine_lacks_the_rest(tmp_path):
    code = "import importlib.util as u; print([n for n in ('tyro', 'tqdm', 'pytest', 'diffusers', 'yaml') if u.find_spec(n)])"
    assert run_with(BARE, tmp_path / "site", "-c", code).stdout.strip() == "[]"


def test_tests_of_the_kernels_need_pytest_and_hypothesis_beside(tmp_path):
    options = [
        "-o",
        "addopts=--import-mode=importlib --strict-markers -ra",
        "-p",
        "no:cacheprovider",
    ]
    done = run_with(
        (*BARE, "pytest", "hypothesis"),
        tmp_path / "site",
        *(
            "-m",
            "pytest",
            *options,
            "tests/gpu/test_kernels.py",
            "tests/gpu/test_plans.py",
            "tests/gpu/test_cuda.py",
        ),
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "needs a CUDA device" in done.stdout
    assert " error" not in done.stdout


def test_a_step_that_cannot_be_walked_fails_the_dry_run(monkeypatch, capsys):
    monkeypatch.setattr(speed, "longest", lambda *x: 1 / 0)
    monkeypatch.setattr(compiling, "compile_all", lambda *x, **y: {"compiled": 0, "compile_s": 0.0})
    assert run("--dry", "--only", "5%, none", "--dry-limit", "1") == 1
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_a_run_of_another_device_is_not_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a chip")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    path = tmp_path / "gpu_check.json"
    facts = {"device": "another chip", "capability": "9.0", "source": command.source_hash()}
    path.write_text(json.dumps({"format_version": 1, "steps": {}, **facts}))
    assert run("--out", str(tmp_path), "--resume", "--until", "0") == 2
    assert "device='another chip'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--out: "),
        (("--out", "x", "--budget", "0"), "--budget=0.0"),
        (("--out", "x", "--budget", "inf"), "--budget=inf"),
        (("--dry", "--dry-limit", "0"), "--dry-limit=0"),
        (("--dry", "--workers", "0"), "--workers=0"),
        (("--dry", "--resume"), "--resume: "),
        (("--list", "--only", "nothing"), "--only=nothing"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(None, list(arguments))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
