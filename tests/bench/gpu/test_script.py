"""`kernels/gpu_check.py` as a process: without a GPU, and on a machine that has almost nothing installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "kernels" / "gpu_check.py"

# What the script may import, and what these packages cannot do without.
BARE = ("torch", "triton", "jaxtyping", "numpy")
REQUIRED = (
    "functorch",
    "torchgen",
    "filelock",
    "typing_extensions",
    "sympy",
    "mpmath",
    "networkx",
    "jinja2",
    "markupsafe",
)
REQUIRED += ("fsspec", "wadler_lindig", "numpy.libs")


def start(*arguments, flags=(), **environment):
    command = [sys.executable, *flags, str(SCRIPT), *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(
        command, capture_output=True, text=True, env=env, timeout=600, check=False
    )


def test_dry_walks_every_step_and_compiles(tmp_path):
    done = start("--dry", "--dry-limit", "8", "--workers", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "gpu_check.json").read_text())
    listed = start("--list").stdout.splitlines()
    assert [x.partition("  (")[0] for x in listed] == list(data["steps"])
    assert {x["status"] for x in data["steps"].values()} == {"done"}
    assert "## Bounds" in (tmp_path / "gpu_check.md").read_text()


def test_runs_with_torch_triton_jaxtyping_and_numpy_alone(tmp_path):
    installed = Path(torch.__file__).parents[1]
    for name in (*BARE, *REQUIRED):
        for found in (
            *installed.glob(name),
            *installed.glob(f"{name}.py"),
            *installed.glob(f"{name}-*.dist-info"),
        ):
            (tmp_path / found.name).symlink_to(found)
    # -S: nothing that is installed but these.
    bare = {"flags": ("-S",), "PYTHONPATH": str(tmp_path)}
    check = "import importlib.util as u; print([n for n in ('tyro', 'tqdm', 'pytest', 'diffusers') if u.find_spec(n)])"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    left = subprocess.run(
        [sys.executable, "-S", "-c", check], capture_output=True, text=True, env=env, check=True
    )
    assert left.stdout.strip() == "[]"
    done = start("--dry", "--only", "none", "--dry-limit", "1", "--workers", "1", **bare)
    assert done.returncode == 0, done.stdout + done.stderr


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
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    done = start(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
