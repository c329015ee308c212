"""Benchmark of attention: rows, memory, and the choice of the crossover."""

import json

import pytest
import torch

from dit_accel.bench import attention_crossover, attention_speed
from dit_accel.bench.attention_cases import (
    MODES,
    Case,
    attend,
    cases,
    dense,
    inputs,
    make_plan,
    weight,
)
from dit_accel.bench.attention_memory import cpu_memory
from dit_accel.bench.attention_speed import AttentionSpeed, runnable

SMALL = Case("small", 4, 256, 16, 32, 32, 0.25, kv_heads=2, every_mode=False)


@pytest.fixture
def small_cases(monkeypatch):
    monkeypatch.setattr(attention_speed, "cases", lambda device: [SMALL])
    monkeypatch.setattr(attention_speed, "cpu_memory", lambda case, dtype: {"extra_mib": 1.0})


def test_a_run_writes_times_relative_to_dense_attention(small_cases, tmp_path, capsys):
    path = tmp_path / "cpu.json"
    AttentionSpeed(output=path, repeats=1).run()
    (row,) = json.loads(path.read_text())["rows"]
    assert set(row["seconds"]) == {"sdpa", "none", "none, planned"}
    assert row["density"] == pytest.approx(0.25)
    ours = row["seconds"]["none"]
    assert ours["speedup"] == pytest.approx(row["seconds"]["sdpa"]["p50"] / ours["p50"])
    assert ours["percent_of_ideal"] == pytest.approx(100 * ours["speedup"] * 0.25)
    assert row["memory"] == {"extra_mib": 1.0}
    assert "small: H=4 N=256" in capsys.readouterr().out


def test_only_keeps_the_rows_of_other_cases(small_cases, tmp_path):
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps({"rows": [{"name": "other"}, {"name": "small, old"}]}))
    AttentionSpeed(output=path, repeats=1, only="small").run()
    assert [x["name"] for x in json.loads(path.read_text())["rows"]] == ["other", "small"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_have_plans_of_their_density(device):
    found = list(cases(device))
    assert found
    for case in found:
        assert case.heads % (case.kv_heads or case.heads) == 0
        assert case.length >= case.block_q


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_that_reads_every_block_is_dense_attention(mode):
    case = Case("all", 4, 128, 16, 32, 32, 1.0, kv_heads=2)
    q, k, v = inputs(case, "cpu", torch.float32)
    proj = torch.zeros_like(weight(case, q))
    found = attend(mode, q, k, v, make_plan(case, q, k), proj)
    torch.testing.assert_close(found, dense(q, k, v))


def test_functions_that_fail_are_left_out_with_their_error():
    good, bad = runnable({"good": lambda: None, "bad": lambda: 1 / 0})
    assert list(good) == ["good"]
    assert bad["bad"].startswith("ZeroDivisionError")


def test_memory_of_a_forward_pass_is_positive_and_small():
    case = Case("memory", 2, 2048, 64, 64, 64, 0.25)
    found = cpu_memory(case, "fp32")  # in a fresh process
    assert 0 <= found["extra_mib"] < 64
    assert found["extra_share"] >= 0


@pytest.mark.parametrize(
    ("faster", "first"),
    [((False, True, True), 128), ((True, False, True), 256), ((True, True, False), None)],
)
def test_the_crossover_is_the_length_from_which_sparse_stays_faster(monkeypatch, faster, first):
    speed = dict(zip((64, 128, 256), (1.5 if x else 1.2 for x in faster), strict=True))
    monkeypatch.setattr(attention_crossover, "CROSSOVER_LENGTHS", tuple(speed))
    monkeypatch.setattr(attention_crossover, "crossover_ratio", lambda case, *x: speed[case.length])
    rows = attention_crossover.crossover_rows("cpu", "fp32", 1)
    assert {row["min_length"] for row in rows if row["block"] == 16} == {first}
    assert all(int(n) >= 4 * row["block"] for row in rows for n in row["speedup_by_length"])
