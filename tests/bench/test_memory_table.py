"""The table of memory by model and GPU."""

import json
from pathlib import Path

import pytest
import torch

from dit_accel.bench.memory_table import MODELS, estimates, smallest_gpu, table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "pipelines/results/memory.json"


@pytest.mark.parametrize("name", ["Stable Diffusion 3 medium", "Wan2.1-T2V-1.3B"])
def test_committed_estimates_are_what_the_library_estimates_today(name):
    model = next(x for x in MODELS if x.name == name)
    row = json.loads(json.dumps(estimates(model)))
    assert row in json.loads(RESULTS.read_text())["rows"]


def test_held_keys_and_values_follow_the_formula():
    model = next(x for x in MODELS if x.name == "Wan2.1-T2V-1.3B")
    row = estimates(model, torch.bfloat16)
    tokens = 21 * (480 // 16) * (832 // 16)
    # Keys and values, layers, tokens, width, bytes of bf16, both halves of guidance.
    kept = 2 * 30 * tokens * 1536 * 2 * 2
    outputs = row["forecast_bytes"]
    assert row["partial_hold_bytes"] == pytest.approx(kept + outputs, rel=1e-3)
    assert row["partial_linear_bytes"] == pytest.approx(2 * kept + outputs, rel=1e-3)


def test_the_documentation_shows_the_committed_table():
    written = (ROOT / "docs/support.md").read_text()
    assert table(json.loads(RESULTS.read_text())["rows"]) in written


@pytest.mark.parametrize(("needed", "gpu"), [(1e9, "16 GB"), (15.9e9, "24 GB"), (500e9, "none")])
def test_the_smallest_gpu_leaves_a_reserve(needed, gpu):
    assert smallest_gpu(needed) == gpu
