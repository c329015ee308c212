"""Fixtures for tests of commands: prompts, images and settings."""

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
    """Return a function that writes a folder of images: the same ones for each folder, with added noise."""

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
    """Return a function that runs a command which must be refused.

    The function checks that no model is loaded, that nothing is written and that the error is one line, and returns the
    line. The current directory is `tmp_path`.
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
