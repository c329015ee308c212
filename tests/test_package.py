"""The package as a whole: light import, root folders, public names."""

import ast
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

import dit_accel

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("folder", ["kernels", "pipelines", "finetune", "eval"])
def test_root_folders_are_no_packages(folder):
    """An importable root folder `kernels` would shadow the Hugging Face package."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_import_loads_nothing_heavy():
    code = (
        "import sys, dit_accel; heavy = {'diffusers', 'transformers', 'triton', 'torchmetrics', 'imageio', 'tyro'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_kernels_know_neither_diffusers_nor_transformers():
    code = (
        "import sys, dit_accel.kernels, dit_accel.sla;"
        "assert not {'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (x.name for x in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(ROOT).parent.parts)
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{module}.{x.name}" for x in node.names)


def test_nothing_of_the_library_imports_bench():
    """Benchmarks stand above the library; scripts alone import them."""
    package = ROOT / "dit_accel"
    files = [x for x in package.rglob("*.py") if package / "bench" not in x.parents]
    found = {
        str(path.relative_to(ROOT)): name
        for path in files
        for name in _imports(path)
        if f"{name}.".startswith("dit_accel.bench.")
    }
    assert not found


def test_every_public_name_resolves_and_unknown_ones_do_not():
    for name in dit_accel.__all__:
        assert getattr(dit_accel, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'SparseWann'"):
        dit_accel.SparseWann  # noqa: B018


FLOORS = (
    {"files", "tensor_files", "lazy", "environment", "quiet"},
    {"config"},
    {"kernels"},
    {"models", "llm"},
    {"runtime"},
    {"ras", "sla"},
    {"checkpoint", "summaries", "memory"},
    {"control"},
    {"pipelines"},
    {"sampling"},
    {"demo"},
    {"eval"},
    {"finetune"},
    {"bench", "cli"},
)
"""Folders and modules of dit_accel; each imports from lower floors and its own only."""


def imported_rooms(path):
    """The folders or modules of dit_accel that a file imports from, at the top or inside functions."""
    here = ["dit_accel", *path.relative_to(ROOT / "dit_accel").parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [x.name for x in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [module] if module.count(".") else [f"{module}.{x.name}" for x in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "dit_accel" and len(parts) > 1:
                yield parts[1]


def test_imports_run_downward():
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    upward = []
    for path in (ROOT / "dit_accel").rglob("*.py"):
        room = path.relative_to(ROOT / "dit_accel").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for other in imported_rooms(path):
            if other in floor and other != room and floor[other] >= floor[room]:
                upward.append(f"{path.relative_to(ROOT)} imports {other}")
    assert not upward


QUESTIONS = {
    "Of", "What", "Where", "Who", "Whose", "Which", "For", "By", "To", "As", "How", "Whether", "In", "From", "One", "See",
    "Also", "Why", "At", "On", "With",
}  # fmt: skip
"""First words of docstrings that name neither an action nor a thing."""


def test_docstrings_open_with_a_verb_or_a_noun():
    found = []
    for folder in ("dit_accel", "tests", "kernels", "pipelines", "eval", "finetune"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                    first = (ast.get_docstring(node) or "").split(" ")[0]
                    if first in QUESTIONS:
                        found.append(f"{path.relative_to(ROOT)}: {ast.get_docstring(node)}")
    assert not found
