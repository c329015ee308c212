"""checkpoint/ stands below the pipelines: nothing in it imports what stands above."""

import re
from pathlib import Path

import pytest

import dit_accel

FILES = sorted((Path(dit_accel.__file__).parent / "checkpoint").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda x: x.name)
def test_imports_run_down(file):
    imported = re.findall(r"(?:from|import) dit_accel\.(\w+)", file.read_text(encoding="utf-8"))
    assert not {"cli", "eval", "finetune", "llm", "pipelines", "sampling"} & set(imported)
