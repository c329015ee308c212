"""Page docs/combinations.md, written from the markers of the tests (pipelines/combinations.py)."""

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

METHODS = ("sla", "ras partial", "ras forecast", "sla and ras", "few-step")
BESIDE = (
    "compile",
    "torchao:int8",
    "layerwise casting",
    "model offload",
    "group offload",
    "LoRA",
    "fused QKV",
    "batch > 1",
    "image to image",
    "ControlNet",
    "IP-Adapter",
    "step caches",
    "context parallelism",
)
MARKERS = ("combines", "refuses")
COLLECT = [
    "--import-mode=importlib",
    "--strict-markers",
    "--collect-only",
    "-qqs",
    "-p",
    "no:cacheprovider",
]
HEAD = """# What combines with what

Written by `make combinations` from the markers of the tests (`@pytest.mark.combines`, `@pytest.mark.refuses`), so that every cell names tests. The numbers lead to the
list below. "not tested" says that no test covers the combination, which may work all the same. "sla" is sparse attention, "ras partial" region-adaptive sampling with a `ratio`, "ras
forecast" with a budget alone, "few-step" the presets of that name.
"""


class Collector:
    """Plugin of pytest that keeps the tests that were collected."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def pytest_collection_finish(self, session: Any) -> None:
        self.items = list(session.items)


def marked_files(root: Path) -> list[Path]:
    """Return the test files that have one of the markers; collecting all of them would take a minute."""
    words = [f"mark.{x}(" for x in MARKERS]
    return [
        path
        for path in sorted((root / "tests").rglob("test_*.py"))
        if any(word in path.read_text(encoding="utf-8") for word in words)
    ]


def collect(root: Path, files: list[Path]) -> list[Any]:
    """Return the tests of these files.

    Raises:
        RuntimeError: a file cannot be collected.
    """
    import pytest

    collector = Collector()
    options = ["-o", f"addopts={' '.join(COLLECT[:2])}", *COLLECT[2:], f"--rootdir={root}"]
    code = pytest.main([*options, *map(str, files)], plugins=[collector])
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"the tests could not be collected (exit code {int(code)})")
    return collector.items


def split_marker(names: tuple[str, ...], test: str) -> tuple[list[str], list[str]]:
    """Return the methods among the names of a marker, and what they are combined with."""
    if unknown := [x for x in names if x not in (*METHODS, *BESIDE)]:
        raise ValueError(
            f"{test}: marker names {unknown}; accepted are {', '.join((*METHODS, *BESIDE))}"
        )
    methods = [x for x in names if x in METHODS]
    if not methods:
        raise ValueError(f"{test}: marker without a method; accepted are {', '.join(METHODS)}")
    return methods, [x for x in names if x in BESIDE]


def page_text(root: Path, items: list[Any]) -> str:
    """Return the text of the page."""
    tests: dict[str, str] = {}
    cells: dict[tuple[str, str], set[str]] = defaultdict(set)
    refused: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    models: dict[tuple[str, str], int] = defaultdict(int)
    families: set[str] = set()
    for item in items:
        name = getattr(item, "originalname", item.name)
        test = f"{item.path.relative_to(root).as_posix()}::{name}"
        family = getattr(getattr(item, "callspec", None), "params", {}).get("family")
        if not isinstance(family, str | None):
            continue  # a test of no family yet, which pytest skips
        for marker in item.iter_markers():
            if marker.name not in MARKERS:
                continue
            methods, beside = split_marker(marker.args, test)
            tests[test] = ""
            for method in methods:
                if marker.name == "combines" and family is not None:
                    models[family, method] += 1
                    families.add(family)
                for other in beside:
                    if marker.name == "combines":
                        cells[method, other].add(test)
                    else:
                        refused[method, other][test] = marker.kwargs["because"]
    numbers = {test: i for i, test in enumerate(sorted(tests), start=1)}

    def links(found: Any) -> str:
        return " ".join(f"[{n}](#tests)" for n in sorted(numbers[x] for x in found))

    def cell(method: str, other: str) -> str:
        parts = []
        if found := cells.get((method, other)):
            parts.append(f"tested {links(found)}")
        if why := refused.get((method, other)):
            parts.append(f"refused: {'; '.join(sorted(set(why.values())))} {links(why)}")
        return ", ".join(parts) or "not tested"

    lines = [HEAD, "## Methods, and what is used beside them", ""]
    lines += [f"| | {' | '.join(METHODS)} |", "|---|" + "---|" * len(METHODS)]
    lines += [
        f"| {other} | {' | '.join(cell(method, other) for method in METHODS)} |" for other in BESIDE
    ]
    lines += ["", "## Models and methods", ""]
    lines += [
        "Numbers of marked tests, parameters counted, on a tiny pipeline of the family with random weights.",
        "",
        f"| model | {' | '.join(METHODS[:-1])} |",
        "|---|" + "---|" * (len(METHODS) - 1),
    ]
    for family, shown in sorted(shown_names(families).items(), key=lambda x: x[1].lower()):
        counts = [models.get((family, method), 0) for method in METHODS[:-1]]
        lines.append(f"| {shown} | {' | '.join(str(n or 'not tested') for n in counts)} |")
    lines += ["", "## Tests", ""]
    lines += [f"{n}. `{test}`" for test, n in numbers.items()]
    return "\n".join(lines) + "\n"


def shown_names(families: set[str]) -> dict[str, str]:
    """Return the names of models by the names that tests have for their families."""
    from dit_accel.models import family_of

    pipelines = sys.modules["tests.random_pipelines"]
    names = {x: family_of(pipelines.make(x).transformer).name for x in families}
    shared = {x for x in names.values() if list(names.values()).count(x) > 1}
    return {x: f"{name} ({x})" if name in shared else name for x, name in names.items()}


def write_page(root: Path, output: Path) -> None:
    """Collect the marked tests of a checkout and write the page.

    Args:
        root: root folder of the checkout.
        output: Markdown file to write.
    """
    output.write_text(page_text(root, collect(root, marked_files(root))), encoding="utf-8")
