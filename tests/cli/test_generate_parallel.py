"""Command `dit-accel generate --parallel`: two processes compute one sample."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from .command import SMALL, run


def test_two_processes_make_the_sample_of_one(wan_repository, small_blocks, tmp_path):
    call = ["generate", "a red circle", "--model", wan_repository, *SMALL, "--kind", "png"]
    call += ["--sla", small_blocks, "--output-dir"]
    assert run(*call, tmp_path / "one") == 0
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("-m", "dit_accel.cli", *map(str, call), str(tmp_path / "two"), "--parallel", "ulysses:2"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["--format", "json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    names = sorted(x.name for x in (tmp_path / "one").iterdir())
    assert names == sorted(x.name for x in (tmp_path / "two").iterdir())
    for name in names:
        if name.endswith(".png"):
            a, b = (np.asarray(Image.open(tmp_path / x / name)).astype(int) for x in ("one", "two"))
            assert abs(a - b).max() <= 1
    record = json.loads((tmp_path / "two" / "0000.json").read_text())
    assert record["parallel"] == {"ulysses": 2}
    # Results of the first process go to stdout, progress to stderr.
    [printed] = json.loads(done.stdout)
    assert printed["prompt"] == record["prompt"] == "a red circle"
    assert "2/2" in done.stderr


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("ulysses:2", "parallel='ulysses:2': WORLD_SIZE is 1"),
        ("ulysses:1", "parallel='ulysses:1'"),
        ("ring:2", "parallel='ring:2'"),
        ("tensor:2", "parallel='tensor:2'"),
    ],
)
def test_what_cannot_be_done_is_refused(refused, wan_repository, value, message):
    assert message in refused("generate", "a", "--model", wan_repository, "--parallel", value)


def test_heads_that_cannot_be_shared_are_refused(refused, wan_repository, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "5")
    line = refused("generate", "a", "--model", wan_repository, "--parallel", "ulysses:5")
    assert "ulysses_degree=5" in line
    assert "blocks.0.attn1" in line
