"""Scripts in the root folders: each can be imported, so that what it imports is there."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path
    for folder in ("eval", "finetune", "kernels", "pipelines")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text()  # others work as soon as they are loaded
)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_scripts_find_what_they_import(path, monkeypatch):
    monkeypatch.syspath_prepend(str(path.parent))  # as Python does for a script
    assert runpy.run_path(str(path), run_name="imported")["__doc__"]
