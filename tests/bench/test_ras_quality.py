"""Benchmark of region-adaptive sampling at equal cost, at a small size."""

import json

import pytest

from dit_accel.bench import ras_learned, ras_quality
from dit_accel.bench.ras_learned import Learned
from dit_accel.bench.ras_quality import FEWER, OURS, Quality, Tables


@pytest.fixture(scope="module", autouse=True)
def few_fine_steps():
    with pytest.MonkeyPatch.context() as patch:
        for module in (ras_quality, ras_learned):
            patch.setattr(module, "FINE_STEPS", 10)
        patch.setattr(ras_quality, "TOLERANCE_TRIALS", 2)
        yield


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ras")
    output = folder / "ras.json"
    options = {
        "model": "tiny-sd3",
        "first": 4,
        "samples": 2,
        "prompts": 8,
        "solvers": ("euler",),
        "steps": (9,),
        "rivals": ("sea_cache",),
        "variants": ("partial", "error control, tokens"),
    }
    Quality(output, **options).run()
    return output, options


def test_every_way_has_its_cost_and_both_references(results):
    report = json.loads(results[0].read_text())
    rows = {x["kind"]: x for x in report["rows"]}
    assert list(rows) == [
        "dense",
        FEWER,
        OURS,
        "sea_cache",
        "partial, by age",
        "partial, by error",
        "error control, tokens",
    ]
    assert rows["error control, tokens"]["ras"]["control"] > 0
    assert rows[OURS]["cost"] == rows[FEWER]["cost"] == rows[FEWER]["steps_taken"] == 6
    assert rows["sea_cache"]["cost"] <= 6 * 1.1
    assert rows["dense"]["plain"]["latent_error"]["mean"] == 0
    for row in rows.values():
        for reference in ("plain", "fine"):
            low, high = row[reference]["psnr_db"]["interval_95"]
            assert low <= row[reference]["psnr_db"]["mean"] <= high
    ours = rows[OURS]
    assert ours["best_cache"] == "sea_cache"
    gap = ours["plain"]["psnr_db"]["mean"] - rows[FEWER]["plain"]["psnr_db"]["mean"]
    assert ours["plain_minus"][FEWER]["mean"] == pytest.approx(gap)


def test_a_run_that_was_stopped_goes_on_where_it_was(results, monkeypatch):
    output, options = results
    before = output.read_text()
    monkeypatch.setattr(Quality, "_make", lambda *_: pytest.fail("sampled again"))
    Quality(output, **options).run()
    assert json.loads(output.read_text())["rows"] == json.loads(before)["rows"]


def test_scores_of_other_samples_are_refused(results):
    output, options = results
    with pytest.raises(ValueError, match=r"work=.*samples=3"):
        Quality(output, **{**options, "samples": 3}).run()


def test_tables_print_what_the_file_holds(results, capsys):
    Tables((results[0],)).run()
    out = capsys.readouterr().out
    assert "tiny-sd3, euler 9" in out
    assert "(SeaCache)" in out
    Tables((results[0],), short=True).run()
    rows = {x["kind"]: x for x in json.loads(results[0].read_text())["rows"]}
    means = [f"{rows[OURS][x]['psnr_db']['mean']:.1f}" for x in ("plain", "fine")]
    assert f"**{' / '.join(means)}**" in capsys.readouterr().out
    Tables((results[0],), full=True).run()
    assert "partial, by error" in capsys.readouterr().out


def test_a_learned_schedule_costs_what_the_computed_one_costs(tmp_path, capsys):
    """The learned schedule is not worse on its training samples, and its steps are those that run."""
    output = tmp_path / "learned.json"
    small = {"model": "tiny-sd3", "steps": 9, "budget": 0.67, "prompts": 8, "solvers": ("euler",)}
    Learned(output, **small, learn=2, first=0, samples=2, tries=2).run()
    row = json.loads(output.read_text())["rows"][0]
    assert len(row["learned_steps"]) == len(row["computed_steps"]) == row["cost"] == 6
    assert {0, 1, 8} <= set(row["learned_steps"])
    gains = [row[f"gain_{x}"]["mean"] for x in ("plain", "fine")]
    assert sum(gains) >= 0
    if row["learned_steps"] == row["computed_steps"]:
        assert gains == [0, 0]
    assert "euler, learned" in capsys.readouterr().out
