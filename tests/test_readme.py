"""Every command and every Python example of the README, run literally and in the order of the page."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from dit_accel.cli import main

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "README.md").read_text()
ELSEWHERE = {
    "pip install dit-accel": "tests/wheel_check.sh installs the wheel",
    "make demo": ".ci/run",
    "make test": ".ci/run",
}
"""Commands that something else runs."""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def commands():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.join(shlex.split(x, comments=True)) for x in lines if x.strip()]


OURS = [x for x in commands() if x not in ELSEWHERE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the commands run one after the other; later ones read what earlier ones wrote."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "docs").mkdir()
    shutil.copy(ROOT / "docs/eval.md", folder / "docs")
    return folder


def test_all_commands_are_run_somewhere():
    assert set(ELSEWHERE) <= set(commands())
    assert len(OURS) > 8
    assert all(x.startswith("dit-accel ") for x in OURS)
    languages = re.findall(r"^```(.*)$", PAGE, re.MULTILINE)[::2]
    assert set(languages) == {"bash", "python"}, "blocks of other languages are not tested"


def test_commands_one_after_the_other(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    for command in OURS:
        main(shlex.split(command)[1:])  # raises SystemExit unless the exit code is 0
        assert capfd.readouterr().out, command


@pytest.mark.parametrize("i", range(len(blocks("python"))))
def test_python_examples(i, folder, monkeypatch):
    monkeypatch.chdir(folder)
    exec(compile(blocks("python")[i], f"README.md, example {i}", "exec"), {})


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGE):
        assert (ROOT / target).exists(), target
