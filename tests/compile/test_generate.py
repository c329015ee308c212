"""`--compile` on a CPU: compiled blocks give the same pictures, with both methods, and with quantised weights."""

import functools
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters

from ..cli.command import run

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler"
)
RAS = "ras:\n  ratio: 0.5\n  warmup: 2\n  tail: 1\n  resets: []\n"
SLA = "sla:\n  topk: 0.3\n  block_q: 16\n  block_k: 16\n  crossover: never\n"
SLA += "  dense_steps: 0\n  dense_layers: 0\n"  # no graph for dense calls


def generate(folder, model, *more):
    out = folder / f"out{len(list(folder.iterdir()))}"
    settings = folder / "settings.yaml"
    settings.write_text(RAS + SLA)
    assert (
        run(
            "generate", "a red circle", "--sla", settings, "--height", 64, "--width", 64,
            "--num-inference-steps", 5, "--output-dir", out, "--kind", "png", *model, *more,
        )
        == 0
    )  # fmt: skip
    record = json.loads(next(out.glob("*.json")).read_text())
    pictures = [np.asarray(Image.open(x), np.float64) for x in sorted(out.rglob("*.png"))]
    return record, np.stack(pictures)


@pytest.mark.parametrize(
    ("model", "backend"),
    [
        (["--model", "tiny-wan", "--num-frames", 9], "inductor"),
        (["--model", "tiny-sd3", "--quantize", "torchao:int8"], "aot_eager"),
    ],
    ids=["tiny-wan", "tiny-sd3, quantised"],
)
@pytest.mark.combines("sla", "compile")
def test_compiled_blocks_make_the_same_pictures(tmp_path, model, backend, monkeypatch):
    """The default compiler has one model. The quantised weights are only traced, because inductor takes far longer."""
    if backend != "inductor":
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    counters.clear()
    ras = ["--ras", tmp_path / "settings.yaml"] if "tiny-wan" in model else []
    _, plain = generate(tmp_path, model, *ras)
    record, compiled = generate(tmp_path, model, *ras, "--compile")
    assert record["compile"] is True
    assert counters["stats"]["unique_graphs"] > 0
    assert record["acceleration"]["density"] < 1
    assert bool(ras) == (record["acceleration"]["ras"] is not None)
    assert plain.std() > 5
    assert np.abs(compiled - plain).max() <= 3  # of 255; sums are rounded in another order
