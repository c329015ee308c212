"""Prompts, pictures and settings for commands."""

import json

import numpy as np
import pytest
from PIL import Image

from .command import run

PROMPTS = [{"id": "a", "prompt": "a red circle"}, {"id": "b", "prompt": "a blue square", "seed": 9}]


@pytest.fixture
def small_blocks(tmp_path):
    path = tmp_path / "sla.yaml"
    path.write_text("sla:\n  topk: 0.5\n  block_q: 16\n  block_k: 16\n  crossover: never\n")
    return path


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in PROMPTS))
    return path


@pytest.fixture
def pictures(tmp_path):
    """`pictures(name, noise)`: a folder of four pictures, noisier ones of the same."""

    def write(name, noise=0, count=4):
        folder = tmp_path / name
        folder.mkdir()
        rng = np.random.default_rng(0)
        for i in range(count):
            clean = rng.integers(40, 200, (32, 32, 3))
            noisy = clean + noise * np.random.default_rng(i).integers(-1, 2, clean.shape)
            Image.fromarray(noisy.astype(np.uint8)).save(folder / f"{i}.png")
        return folder

    return write


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch, unchecked):
    """`refused(*arguments)`: a command is refused in one line before a model is loaded, and writes nothing.

    Returns the line. Runs in a folder of its own, where relative paths lead.
    """

    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", loaded)
    monkeypatch.setattr("diffusers.ModelMixin.from_pretrained", loaded)
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        code = run(*arguments)
        printed = capsys.readouterr()
        assert code == 2, printed.err
        assert printed.out == ""
        lines = printed.err.splitlines()
        assert len(lines) == 1, printed.err
        assert lines[0].startswith("error: ")
        assert sorted(tmp_path.rglob("*")) == before
        return lines[0]

    return call
