"""`kernels/gpu_check.py` as a process: without a GPU, and on a machine that has almost nothing installed."""

import json
import runpy
import subprocess
import sys

import pytest

from ...installed import BARE, ROOT, run_with

SCRIPT = ROOT / "kernels" / "gpu_check.py"


def start(*arguments):
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_dry_walks_every_step_and_compiles(tmp_path):
    done = start("--dry", "--dry-limit", "8", "--workers", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "gpu_check.json").read_text())
    listed = start("--list").stdout.splitlines()
    assert {x.partition("  (")[0] for x in listed} == data["steps"].keys()
    assert {x["status"] for x in data["steps"].values()} == {"done"}
    text = (tmp_path / "gpu_check.md").read_text()
    assert "Dry run: nothing was measured" in text
    assert "## Bounds" in text


@pytest.mark.parametrize(
    "content", ['{"dry": false, "steps": {}}', "{"], ids=["measured", "broken"]
)
def test_a_dry_run_keeps_what_was_measured(content, tmp_path):
    path = tmp_path / "gpu_check.json"
    path.write_text(content)
    done = start("--dry", "--only", "none", "--dry-limit", "1", "--out", str(tmp_path))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "would be lost" in done.stdout
    assert path.read_text() == content


def test_runs_with_torch_triton_jaxtyping_and_numpy_alone(tmp_path):
    options = ("--dry", "--only", "none", "--dry-limit", "1", "--workers", "1")
    done = run_with(BARE, tmp_path / "site", str(SCRIPT), *options)
    assert done.returncode == 0, done.stdout + done.stderr


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


def test_a_step_that_cannot_be_walked_fails_the_dry_run():
    code = (
        "import sys, runpy; import dit_accel.bench.gpu.speed as s; s.longest = lambda *a: 1 / 0;"
        "sys.argv = ['x', '--dry', '--only', '5%, none', '--dry-limit', '1'];"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--out: accepted is a folder"),
        (("--out", "x", "--budget", "0"), "--budget=0.0"),
        (("--out", "x", "--budget", "inf"), "--budget=inf"),
        (("--dry", "--dry-limit", "0"), "--dry-limit=0"),
        (("--dry", "--workers", "0"), "--workers=0"),
        (("--dry", "--resume"), "--resume: accepted without --dry"),
        (("--list", "--only", "nothing"), "--only=nothing"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
