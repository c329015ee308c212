"""`kernels/bench_prefill.py`: rows and tables of small sizes."""

import json
from pathlib import Path

from dit_accel.bench.first_token import ALWAYS, DENSE, FirstToken
from dit_accel.bench.prefill_speed import PrefillSpeed


def test_first_token_times_presets_with_and_without_their_crossover(
    small_llama, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("near.yaml").write_text("prefill: {pattern: triangle, options: {window: 64}}\n")
    output = tmp_path / "times.json"
    sizes = {"lengths": (512, 700), "dtypes": ("fp32",), "repeats": 1}
    FirstToken(output, model=str(small_llama), text="code", prefill=("near.yaml",), **sizes).run()
    record = json.loads(output.read_text())
    rows = {(x["length"], x["kind"]): x for x in record["rows"]}
    always = f"near.yaml, {ALWAYS}"
    assert list(rows) == [(n, kind) for n in (512, 700) for kind in (DENSE, "near.yaml", always)]
    for n in (512, 700):
        assert rows[n, DENSE]["dense_over_this"] == 1
        assert rows[n, "near.yaml"]["density"] == 1  # below the crossover
        assert rows[n, "near.yaml"]["planning_seconds"] == 0
        assert rows[n, always]["density"] < 1
        took, planning = rows[n, always]["seconds"], rows[n, always]["planning_seconds"]
        assert 0 < planning < took
        assert rows[n, always]["dense_over_this"] == rows[n, DENSE]["seconds"] / took
    printed = capsys.readouterr().out
    assert "| | 512 | 700 |" in printed
    assert [x.split(" | ")[0] for x in printed.splitlines() if x.startswith("| d")] == [f"| {DENSE}"]  # fmt: skip


def test_layer_times_plans_of_given_densities(tmp_path, capsys):
    output = tmp_path / "layer.json"
    PrefillSpeed(output, lengths=(512,), dtypes=("fp32",), densities=(0.5,), repeats=1).run()
    rows = {x["kind"]: x for x in json.loads(output.read_text())["rows"]}
    assert rows["dense"]["over_dense"] == 1
    for kind in ("one pattern a group, 0.5", "one pattern a head, 0.5"):
        assert 0.5 <= rows[kind]["density"] < 0.7  # at least half of each row's blocks
    every = rows["every block"]["seconds"]
    found = rows["one pattern a head, 0.5"]
    assert found["share_of_ideal"] == found["density"] * every / found["seconds"]
    assert "| one pattern a head, 0.5 | " in capsys.readouterr().out
