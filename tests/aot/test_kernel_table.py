"""The kernel table: two kernels compiled for sm_80, as Markdown and JSON, and its bounds."""

import dataclasses
import json

import pytest

from dit_accel.bench import kernel_table
from dit_accel.bench.kernel_table import KernelTable
from dit_accel.bench.split_head_dim import launch
from dit_accel.kernels.aot import compile_launch
from dit_accel.kernels.block_sparse.tiles import Target

NAMES = ("pool/router", "forward/plain")


@pytest.fixture
def run(monkeypatch):
    """Return `run(stages, **options)`: the table of two launches, the second with `stages` pipeline stages."""
    every = kernel_table.launches("80", 64, "bf16")

    def run(stages, **options):
        router, forward = (every[name] for name in NAMES)
        forward = dataclasses.replace(forward, num_stages=stages)
        found = dict(zip(NAMES, (router, forward), strict=True))
        monkeypatch.setattr(kernel_table, "launches", lambda *job: found)
        KernelTable(targets=("80",), head_dims=(64,), check=True, processes=1, **options).run()

    return run


def test_table_and_json(run, tmp_path):
    markdown, by_loop = tmp_path / "table.md", tmp_path / "table.json"
    run(3, output=markdown, json=by_loop)
    assert "## Bounds missed: 0" in markdown.read_text()
    assert "| forward/plain | 64 bf16 | TQ 64 TK 64 |" in markdown.read_text()
    assert "| predicted |" in markdown.read_text()
    router, forward = json.loads(by_loop.read_text())["kernels"]
    assert router["loops"] == []
    assert forward["name"] == "forward/plain"
    assert all(x["wait"] > 0 and x["instructions"]["matrix"] > 0 for x in forward["loops"])


def test_check_fails_on_a_loop_whose_loads_overlap_with_nothing(run, capsys):
    with pytest.raises(SystemExit) as failure:
        run(2)
    assert failure.value.code == 1
    printed = capsys.readouterr()
    assert "- sm_80, async_wait 0 in loop 1: forward/plain (64)" in printed.out
    assert "1 miss" in printed.err


def test_a_file_that_cannot_be_written_is_refused_before_anything_compiles(run, tmp_path):
    with pytest.raises(ValueError, match=r"^--json="):
        run(3, json=tmp_path)


def test_split_products_use_less_shared_memory_than_padding():
    target = Target("cuda", "80")
    split, padded = (
        compile_launch(launch(72, *parts, 64, 4), target) for parts in ((64, 16), (128, 0))
    )
    assert split.matrix
    assert split.shared < padded.shared
