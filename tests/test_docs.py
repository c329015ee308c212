"""docs/hooks.py: places of linked files in the documentation site. `make docs` builds the site."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from .cli.command import run

ROOT = Path(__file__).parents[1]


@pytest.fixture
def hooks():
    return runpy.run_path(str(ROOT / "docs" / "hooks.py"))


@pytest.mark.parametrize(
    ("page", "text", "expected"),
    [
        ("sla.md", "[x](../dit_accel/ras/README.md#a)", "[x](repository/dit_accel/ras/about.md#a)"),
        ("sla.md", "[x](../README.md#figures), [y](ras.md)", "[x](index.md#figures), [y](ras.md)"),
        ("reference/eval.md", "[x](../eval.md)", "[x](../eval.md)"),
        ("index.md", "![x](assets/demo.png) [y](docs/ras.md)", "![x](repository/assets/demo.png) [y](ras.md)"),
        ("repository/ARCHITECTURE.md", "[x](docs/ras.md) [y](README.md)", "[x](../ras.md) [y](../index.md)"),
        ("kvcache.md", "[x](../kernels/kv_caches)", "[x](repository/kernels/kv_caches/index.md)"),
        ("sla.md", "[x](https://arxiv.org/abs/1) [y](#a) [z](none.md)", "[x](https://arxiv.org/abs/1) [y](#a) [z](none.md)"),
    ],
)  # fmt: skip
def test_links_lead_to_the_same_files_in_the_site(hooks, page, text, expected):
    path = {"index.md": "README.md"}.get(page, f"docs/{page}")
    hooks["sources"][page] = page.removeprefix("repository/") if "repository" in page else path
    page = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    assert hooks["on_page_markdown"](text, page=page) == expected


def test_every_link_of_a_page_leads_to_a_file(hooks):
    pages = ["README.md", *(f"docs/{x.name}" for x in (ROOT / "docs").glob("*.md"))]
    for page in pages:
        text = (ROOT / page).read_text()
        found = {target for target, _ in hooks["targets"](page, text)}
        assert found == set(hooks["LINK"].findall(text)), page


def test_every_command_is_on_the_page_of_the_command_line(hooks, capsys):
    def names(*command):
        run(*command, "--help")
        return re.findall(r"• (\S+)", capsys.readouterr().out)

    expected = {
        " ".join((name, *more)) for name in names() for more in ([(x,) for x in names(name)] or [()])
    }  # fmt: skip
    assert set(hooks["COMMANDS"]) == expected
