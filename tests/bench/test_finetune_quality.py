"""Benchmark of fine-tuning: its rows, its numbers, and a small run."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dit_accel.bench import finetune_quality
from dit_accel.bench.finetune_quality import RIVAL, UNTUNED, FinetuneQuality, closed, config_of
from dit_accel.bench.finetune_rows import RECIPE, learned, rows_of
from dit_accel.bench.subjects import METRICS
from dit_accel.finetune.recipe import read_recipe

ROWS = [row for topk in (0.1, 0.05) for row in rows_of(topk, 30, 10)]


def test_rows_have_names_of_their_own():
    assert len({row.key for row in ROWS}) == len(ROWS)
    assert learned(0.1, 30).key != learned(0.1, 60).key


def test_every_row_is_what_fine_tuning_accepts(tmp_path):
    for row in ROWS:
        config = config_of(row, tmp_path, None)
        assert config.sla_config.topk == row.topk
        assert (config.sla_config.dense_steps, config.sla_config.dense_layers) == (0, 0)
        assert config.sla_config.crossover == "never"


def test_rows_differ_in_what_their_names_say(tmp_path):
    found = {row.name: config_of(row, tmp_path, None) for row in rows_of(0.1, 30, 10)}
    assert found["top-k, untuned"].sla["combine"] == "none"
    assert found["regression (a)"].stages == ("regression",)
    assert found["distillation (b)"].router == "fixed"
    assert found["distillation, LoRA"].train == "lora"
    assert found["distillation, learned router, 30 steps"].router == "learned"
    diffusion = found["diffusion loss"]
    # A pass of the teacher is a quarter of a step.
    assert (diffusion.loss, diffusion.max_train_steps) == ("diffusion", 40)


def test_closed_is_the_share_of_the_mean_error_that_is_gone():
    before = np.array([1.0, 3.0] * 50)
    share = closed(before, before / 4)
    assert share["mean"] == pytest.approx(0.75)
    assert share["interval_95"] == pytest.approx([0.75, 0.75])
    noise = np.random.default_rng(0).normal(size=100) * 0.1
    low, high = closed(before, before / 4 + noise)["interval_95"]
    assert low < 0.75 < high


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    names = (UNTUNED, RIVAL, "distillation (b)")
    output, recipe = folder / "result.json", folder / "small.yaml"
    options = read_recipe(RECIPE) | {
        "num_teacher_samples": 1,
        "teacher_num_inference_steps": 1,
        "train_batch_size": 1,
        "num_frames": 5,
        "lr_warmup_steps": 0,
    }
    recipe.write_text(json.dumps(options))  # YAML reads JSON
    benchmark = FinetuneQuality(
        output=output,
        topk=(0.1,),
        samples=2,
        batch_size=2,
        steps=2,
        max_train_steps=1,
        regression_steps=1,
        longer_steps=(2,),
        recipe=str(recipe),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            finetune_quality, "rows_of", lambda *x: [r for r in rows_of(*x) if r.name in names]
        )
        benchmark.run()
        yield benchmark, json.loads(output.read_text()), names


def test_a_run_has_every_figure_of_every_row(small):
    _, report, names = small
    assert [row["name"] for row in report["rows"]] == [*names, learned(0.1, 2).name]
    for row in report["rows"]:
        assert all(np.isfinite(row[name]["mean"]) for name in METRICS)
        assert 0 < row["density"] < 0.2
        trained = "options" in row
        assert not trained or sorted(row["training"]) == ["cpu_seconds", "seconds"]
        assert ("gap_closed" in row) == ("error_minus_rival" in row) == trained
    assert report["training_samples"] == 1
    assert report["cpu_minutes"] > 0
    assert report["longer_cpu_minutes"] > 0


def test_a_second_run_goes_on_where_the_first_ended(small, capsys):
    benchmark, report, _ = small
    benchmark.run()  # every score is known: seconds, and the same figures
    again = json.loads(benchmark.output.read_text())
    assert again["rows"] == report["rows"]
    assert again["cpu_minutes"] == report["cpu_minutes"]
    printed = capsys.readouterr().out
    assert all(f"| {row['name']} |" in printed for row in report["rows"])


def test_results_of_other_settings_are_not_taken_over(small):
    benchmark, _, _ = small
    with pytest.raises(ValueError, match=r"max_train_steps=9: .* 1;"):
        replace(benchmark, max_train_steps=9).run()
