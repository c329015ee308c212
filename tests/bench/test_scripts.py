"""Small benchmarks: launches, windows, import time, traffic between processes, ranks of blocks."""

import json
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch

from dit_accel.bench import launch_counts, split_head_dim
from dit_accel.bench.import_time import ImportTime
from dit_accel.bench.launch_counts import LaunchCounts, missed
from dit_accel.bench.middle_estimates import MiddleEstimates, rank
from dit_accel.bench.parallel_traffic import ParallelTraffic
from dit_accel.bench.window_speed import WindowSpeed

from ..installed import ROOT


def test_launches_of_every_mode_are_counted_and_keep_their_bounds(tmp_path, capsys, monkeypatch):
    # The NaN of conftest.py in unwritten memory would count as operators.
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, getattr(function, "__wrapped__", function))
    monkeypatch.setattr(launch_counts, "ROUTERS", ("spread",))
    path = tmp_path / "launches.json"
    LaunchCounts(output=path, host=False, check=True).run()
    rows = json.loads(path.read_text())["rows"]
    assert all(row["launches"] and row["total"] >= row["router_and_plan"] for row in rows)
    assert f"| {rows[0]['mode']} | spread | {rows[0]['total']} |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({}, None),
        ({"total": 6}, "6 launches"),
        ({"router_and_plan": 5}, "5 launches of router"),
        ({"syncs": ["item"]}, "item"),
        ({"host_us": 1e6}, "1000000.0 us"),
    ],
)
def test_missed_bounds_of_launches(changed, text, monkeypatch, capsys):
    row = {
        "mode": "none",
        "router": "mean",
        "total": 5,
        "bound": 5,
        "router_and_plan": 4,
        "syncs": [],
    }
    row |= {"torch_ops": {}, "launches": {}, **changed}
    assert [text in x for x in missed(row)] == [True] * (text is not None)
    monkeypatch.setattr(LaunchCounts, "row", lambda *x: row)
    if text is None:
        LaunchCounts(check=True).run()
    else:
        with pytest.raises(SystemExit):
            LaunchCounts(check=True).run()
        assert text in capsys.readouterr().err


def test_ways_to_attend_in_a_window_give_the_same_result(tmp_path):
    path = tmp_path / "window.json"
    speed = WindowSpeed(path, cases=((128, 32),), repeats=1)
    found = {name: function() for name, function in speed._functions(128, 32).items()}
    for name in ("chunks", "plan"):
        torch.testing.assert_close(found[name], found["mask of pairs"])
    assert not torch.allclose(found["causal"], found["plan"])
    speed.run()
    (row,) = json.loads(path.read_text())["rows"]
    assert {"length", "window", *found} == set(row)


def test_import_times_are_compared_by_their_medians(tmp_path, monkeypatch, capsys):
    times = iter([1.0, 3.0, 2.0, 2.0, 9.0, 8.0])
    monkeypatch.setattr(subprocess, "run", lambda *x, **y: SimpleNamespace(stdout=str(next(times))))
    path = tmp_path / "import.json"
    ImportTime(path, repeats=3).run()
    record = json.loads(path.read_text())
    assert record["cpu_seconds"] == {"torch": [1.0, 2.0, 9.0], "dit_accel": [3.0, 2.0, 8.0]}
    assert record["ratio"] == 1.5
    assert "ratio 1.50" in capsys.readouterr().out


def test_the_table_of_traffic_is_that_of_the_documentation(capsys):
    ParallelTraffic(table=ROOT / "pipelines" / "results" / "parallel_traffic.json").run()
    page = (ROOT / "docs" / "parallel.md").read_text()
    section = re.search(r"<!-- traffic.*?-->\n+(.*?)\n+<!-- end", page, re.DOTALL)
    assert capsys.readouterr().out.strip() == section[1].strip()


def test_the_rank_counts_the_better_blocks_up_to_the_diagonal():
    scores = torch.tensor([[9.0, 1.0, 1.0], [3.0, 2.0, 9.0], [1.0, 3.0, 2.0]])[None, None]
    assert rank(scores, 1, 0) == 1
    assert rank(scores, 1, 1) == 2
    assert rank(scores, 2, 0) == 3


def test_a_pattern_with_the_exact_attention_reads_every_key_that_is_looked_up(capsys):
    MiddleEstimates(length=512, prompts=1).run()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 4 + 6
    assert lines[5].startswith("exact ")
    assert lines[5].endswith("4 of 4")


def test_the_section_of_split_products_has_a_row_for_each_variant(monkeypatch, tmp_path):
    usage = SimpleNamespace(matrix={"wgmma": 2}, registers=1, spills=0, shared=2048, async_copies=3)
    monkeypatch.setattr(split_head_dim, "compile_launch", lambda *x: usage)
    path = tmp_path / "table.md"
    path.write_text("# Title\n\n")
    split_head_dim.SplitHeadDim(path).run()
    text = path.read_text()
    assert text.startswith("# Title\n\n## Split")
    assert text.count("| sm_90 |") == text.count("| sm_80 |") == 8
    assert "| sm_90 | 72 | 64 + 16 | 64, 4 | 1.11 | 1 | 0 | 2.0 | 2 wgmma | 3 |" in text
