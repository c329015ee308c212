"""The script that writes the kernel table: two kernels compiled, and what it says of missed bounds."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "kernels" / "kernel_table.py"
NAMES = ("pool/router", "forward/plain")


@pytest.fixture
def run(monkeypatch):
    """`run(stages, **options)`: the script on two launches for sm_80, the second with so many stages."""
    spec = importlib.util.spec_from_file_location("kernel_table", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kernel_table", script)  # its dataclasses look for it there
    spec.loader.exec_module(script)
    every = script.launches

    def run(stages, **options):
        router, forward = (every("80", 64, "bf16")[name] for name in NAMES)
        forward = dataclasses.replace(forward, num_stages=stages)
        found = dict(zip(NAMES, (router, forward), strict=True))
        monkeypatch.setattr(script, "launches", lambda *job: found)
        script.main(
            script.Args(targets=("80",), head_dims=(64,), check=True, processes=1, **options)
        )

    return run


def test_table_and_json(run, tmp_path):
    markdown, by_loop = tmp_path / "table.md", tmp_path / "table.json"
    run(3, output=markdown, json=by_loop)
    assert "## Bounds missed: 0" in markdown.read_text()
    assert "| forward/plain | 64 bf16 | TQ 64 TK 64 |" in markdown.read_text()
    assert "| predicted |" in markdown.read_text()
    router, forward = json.loads(by_loop.read_text())["kernels"]
    assert router["loops"] == []
    assert forward["name"] == "forward/plain"
    assert all(x["wait"] > 0 and x["instructions"]["matrix"] > 0 for x in forward["loops"])


def test_check_fails_on_a_loop_whose_loads_overlap_with_nothing(run, capsys):
    with pytest.raises(SystemExit) as failure:
        run(2)
    assert failure.value.code == 1
    printed = capsys.readouterr()
    assert "- sm_80, async_wait 0 in loop 1: forward/plain (64)" in printed.out
    assert "1 miss a bound" in printed.err


def test_a_file_that_cannot_be_written_is_refused_before_anything_compiles(run, tmp_path):
    with pytest.raises(ValueError, match=r"^--json="):
        run(3, json=tmp_path)
