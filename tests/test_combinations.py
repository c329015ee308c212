"""docs/combinations.md says what the markers of the tests say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dit_accel.bench.combinations import split_marker

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "pipelines" / "combinations.py"


def test_the_page_is_up_to_date(tmp_path):
    path = tmp_path / "combinations.md"
    # The shell of an outer pytest has options of its own.
    environment = {k: x for k, x in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--output", str(path)],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = (ROOT / "docs" / "combinations.md").read_text(encoding="utf-8")
    assert shown == path.read_text(encoding="utf-8"), "run `make combinations`"


@pytest.mark.parametrize("names", [("sla", "complie"), ("compile",), ()])
def test_markers_with_other_names_are_errors(names):
    with pytest.raises(ValueError, match="marker"):
        split_marker(names, "tests/x.py::test")


def test_markers_name_methods_and_what_is_beside_them():
    assert split_marker(("LoRA", "sla", "few-step"), "x") == (["sla", "few-step"], ["LoRA"])
