"""ARCHITECTURE.md: the files and folders that it names exist, and it shows the tested order of imports."""

import re
from pathlib import Path, PurePosixPath

from .test_package import FLOORS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dit_accel"
TEXT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
WRITTEN = {"matches.json", "model_index.json", "ras.json", "results.json", "timings.json"}
"""Files of runs and of models. They are not in the repository."""
NAME = re.compile(r"(?<![\w./<>*-])[\w.*/-]*(?:\w\.(?:py|md|json|txt|yaml)|\w/)(?![\w/<])")
ENTRY = 6
"""Largest indentation of an entry of the tree. A line with a larger one continues the description above it."""


def names(text):
    """Return the names of files and of folders (with "/" at the end) in a text."""
    return [x for x in NAME.findall(text) if PurePosixPath(x).name not in WRITTEN]


def block(heading):
    """Return the first code block below a heading."""
    return TEXT.split(f"\n## {heading}\n", 1)[1].split("```\n", 2)[1]


def tree():
    """Yield (folder, name) for each file and folder that the tree names; the indentation gives the folder."""
    folders = {}
    for line in block("Folders").splitlines():
        indent = len(line) - len(line.lstrip())
        if indent <= ENTRY:
            folders = {k: x for k, x in folders.items() if k < indent}
            parent = folder = folders[max(folders)] if folders else ROOT
            first, _, line = line.strip().partition(" ")
            yield parent, first
            if first.endswith("/"):
                folders[indent] = folder = parent / first
        for name in names(line):
            yield folder, name


def found(name, *folders):
    return [path for folder in folders for path in folder.glob(name.rstrip("/"))]


def test_the_tree_names_what_exists():
    missing = [
        f"{folder.relative_to(ROOT)}: {name}"
        for folder, name in tree()
        if not found(name, folder, folder.parent, ROOT)
    ]
    assert not missing


def test_the_text_names_what_exists():
    text = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    places = [ROOT / x for x in ("dit_accel", "docs", "tests")]
    missing = {
        x for x in names(text) if not found(x, ROOT) and not found(f"**/{x}", *places)
    }  # fmt: skip
    assert not missing


def test_the_tree_names_every_package():
    named = {path for folder, name in tree() for path in found(name, folder)}
    packages = {path.parent for path in PACKAGE.rglob("__init__.py")}
    assert not packages - named


def test_the_order_of_imports_is_the_one_that_is_tested():
    floors = [set(re.findall(r"\w+", x)) for x in block("Imports").split("->")]
    assert floors[::-1] == list(FLOORS)
