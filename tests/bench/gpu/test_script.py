"""`kernels/gpu_check.py` as a process: without a GPU, and on a machine that has almost nothing installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "kernels" / "gpu_check.py"

# torch's own requirements count as torch.
BARE = """
import sys
allowed = {"torch", "triton", "jaxtyping", "numpy", "dit_accel", "wadler_lindig", "filelock", "typing_extensions",
           "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "torchgen", "functorch", "_distutils_hack",
           "setuptools", "pkg_resources", "__mp_main__", *sys.stdlib_module_names}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed and not name.startswith("_sysconfigdata"):
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

sys.meta_path.insert(0, Blocker())
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(*arguments, bare=False):
    command = [sys.executable, *(("-c", BARE) if bare else ()), str(SCRIPT), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ, timeout=600, check=False
    )


def test_dry_walks_every_step_and_compiles(tmp_path):
    done = start("--dry", "--dry-limit", "8", "--workers", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "gpu_check.json").read_text())
    listed = start("--list").stdout.splitlines()
    assert [x.partition("  (")[0] for x in listed] == list(data["steps"])
    assert {x["status"] for x in data["steps"].values()} == {"done"}
    assert "## Bounds" in (tmp_path / "gpu_check.md").read_text()


def test_runs_with_torch_triton_jaxtyping_and_numpy_alone():
    done = start("--dry", "--only", "none", "--dry-limit", "1", "--workers", "1", bare=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_step_that_cannot_be_walked_fails_the_dry_run(tmp_path):
    code = (
        "import sys, runpy; import dit_accel.bench.gpu.speed as s; s.longest = lambda *a: 1 / 0;"
        f"sys.argv = ['x', '--dry', '--only', '5%, none', '--dry-limit', '1']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
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
def test_bad_arguments_are_refused(arguments, message, tmp_path):
    done = start(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
