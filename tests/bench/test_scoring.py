"""Benchmark of scoring."""

import json

import pytest
import torch

from dit_accel.bench import scoring
from dit_accel.bench.scoring import ScoringSpeed, measured_run, our_distance

from ..installed import ROOT


def test_ratios_are_those_of_the_parts_and_the_record_has_the_committed_fields(
    tmp_path, monkeypatch
):
    seconds = {"our_scores": 2.0, "their_fid": 6.0, "our_distance": 1.0, "their_distance": 5.0}

    def run_alone(prepare, threads, *args):
        if prepare is scoring.our_scores:
            names = [sorted(x.name for x in (args[0] / y).iterdir()) for y in scoring.FOLDERS]
            assert names[0] == names[1]
            assert len(names[0]) in (2, 4)
        time = seconds[prepare.__name__]
        return {
            "seconds": time,
            "cpu_seconds": 2 * time,
            "value": 1 + time,
            "peak_bytes": 2,
            "growth_bytes": 1,
        }

    monkeypatch.setattr(scoring, "run_alone", run_alone)
    path = tmp_path / "score.json"
    ScoringSpeed(path, images=4, repeats=2).run()
    record = json.loads(path.read_text())
    assert list(record["ratios"].values()) == pytest.approx([3, 5, 5, 2 / 6 - 1, 3 / 7 - 1])
    committed = json.loads((ROOT / "eval" / "results" / "score_cpu.json").read_text())
    for key in ("settings", "images", "frechet", "ratios"):
        assert record[key].keys() == committed[key].keys()
    assert record["images"]["fd_tiny"].keys() == committed["images"]["fd_tiny"].keys()
    assert record["images"]["fd_tiny"]["each_seconds"] == [2.0, 2.0]


def test_a_measured_run_has_the_value_of_its_function():
    found = measured_run(our_distance, torch.get_num_threads(), 40, 8)
    assert found["value"] == our_distance(40, 8)() > 0
    assert found["peak_bytes"] >= found["growth_bytes"] >= 0
