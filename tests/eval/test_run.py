"""Whole evaluations on tiny pipelines: one table, kills, what is not available, bad input."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dit_accel import control
from dit_accel.config import RASConfig
from dit_accel.eval.metrics.networks import Networks
from dit_accel.eval.metrics.score import score
from dit_accel.eval.results.store import read_results
from dit_accel.eval.runs import timing as timing_module
from dit_accel.eval.runs.caches import read_cache
from dit_accel.eval.runs.methods import dense_with
from dit_accel.eval.runs.scores import choose_metrics
from dit_accel.runtime.install import installation_of
from dit_accel.sampling.generate import generate
from dit_accel.sampling.prompts import PromptRecord, number_prompts
from dit_accel.sampling.sets import SampleSet
from dit_accel.sampling.settings import Sampling

from .run_worker import FEW, PROMPTS, SAMPLING, evaluate


@pytest.fixture(scope="module", autouse=True)
def _no_garbage_collection():
    """It takes long in a process full of tests, and comes before each measured call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dit_accel.eval.runs.timing.gc.collect", lambda: 0)
        yield


@pytest.fixture(scope="module")
def folder(wan, tmp_path_factory):
    """All methods, never interrupted."""
    folder = tmp_path_factory.mktemp("run")
    evaluate(wan, folder)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return read_results(folder)


def rows_of(results, method=None):
    return {x["name"]: x for x in results["rows"] if method in (None, x["method"])}


def test_every_method_is_a_row_of_one_table(results, folder):
    methods = [x["method"] for x in results["rows"]]
    fewer = methods.count("fewer_steps")
    assert fewer >= 1
    rest = ["cache", "cache", "ras", "sla", "ras_sla"]
    assert methods == ["dense", *["fewer_steps"] * fewer, *rest]
    assert all(x["available"] for x in results["rows"])
    assert {x.name for x in folder.iterdir() if x.is_file()} == {
        "results.json", "timings.json", "matches.json", "table.md", "grid.png", "report.html",
    }  # fmt: skip
    page = (folder / "report.html").read_text()
    assert all(name.replace("+", "&#43;") in page or name in page for name in rows_of(results))


def test_metrics_are_those_of_the_sample_sets(results, folder):
    rows = rows_of(results)
    for row in rows.values():
        made = SampleSet.open(folder / row["folder"])
        assert made.ids == ("a", "b")
        assert "flicker" in row["metrics"]
        if row["method"] == "dense":
            assert "psnr" not in row["metrics"]
            continue
        found = score(
            made,
            reference=folder / rows["Dense"]["folder"],
            metrics=["psnr", "ssim"],
            progress=False,
        )
        assert row["metrics"]["psnr"] == found["psnr"]
        assert row["metrics"]["ssim"] == found["ssim"]
    assert rows["SLA"]["metrics"]["psnr"]["value"] < 60  # it did something
    assert 0 < rows["SLA"]["density"] < 1
    assert rows["SLA"]["settings"]["sla"]["topk"] == 0.5
    assert rows["SLA"]["settings"]["dense_calls"]["dense layer"] > 0
    assert 0 < rows["RAS"]["cost"] < 3
    assert rows["RAS"]["settings"]["ras"]["warmup"] == 1
    assert set(rows["RAS + SLA"]["settings"]) >= {"ras", "sla"}
    cache = rows["FirstBlockCache"]["settings"]
    assert cache["cache"] == {"name": "FirstBlockCache", "threshold": cache["matched"]["value"]}
    assert rows["FirstBlockCache"]["cost"] == pytest.approx(3 * cache["matched"]["cost"])


def test_seconds_are_measured_apart_from_the_sets(results, folder):
    timings = json.loads((folder / "timings.json").read_text())["calls"]
    dense = rows_of(results)["Dense"]["seconds"]
    for row in results["rows"]:
        calls = [x["seconds"] for x in timings[row["name"]]]
        assert len(calls) == results["repeats"] == 2
        for phase in ("text", "denoise", "decode", "total"):
            found = row["seconds"][phase]
            values = [x[phase] for x in calls]
            assert found["median"] == pytest.approx(sum(values) / 2)
            assert min(values) <= found["iqr"][0] <= found["iqr"][1] <= max(values)
            assert found["n"] == 2
        ratio = dense["total"]["median"] / row["seconds"]["total"]["median"]
        assert row["speedup"]["total"] == pytest.approx(ratio)
        assert row["peak_memory_of"] in ("process", None)
        assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] > 50 << 20


def test_dense_sampling_with_fewer_steps_is_sampled_and_scored(results, folder):
    dense = rows_of(results)["Dense"]
    for row in rows_of(results, "fewer_steps").values():
        steps = row["num_inference_steps"]
        assert 1 <= steps < 3
        assert row["name"] == dense_with(steps).name
        manifest = json.loads((folder / row["folder"] / "manifest.json").read_text())
        assert manifest["sampling"]["num_inference_steps"] == steps
        assert manifest["acceleration"] == {"sla": None, "ras": None, "cache": None}
        assert row["metrics"]["psnr"]["value"] is not None
        assert row["cost"] == steps
        for name in row["settings"].get("equal_time_to", []):
            other = rows_of(results)[name]
            assert other["method"] in ("cache", "ras", "sla", "ras_sla")
            assert other["seconds"]["denoise"]["median"] < dense["seconds"]["denoise"]["median"]


def test_media_of_every_row_are_named(results, folder):
    assert [x["prompt"] for x in results["samples"]] == [x.prompt for x in PROMPTS]
    for sample in results["samples"]:
        assert set(sample["media"]) == set(rows_of(results))
        for path in sample["media"].values():
            assert (folder / path).is_file()
            assert Path(path).suffix == ".mp4"


def test_run_again_it_makes_nothing_and_says_the_same(wan, folder, results, monkeypatch):
    before = {x: x.stat().st_mtime_ns for x in folder.rglob("*") if x.suffix in (".png", ".mp4")}
    grid = folder / "grid.png"
    monkeypatch.setattr(timing_module, "run_batch", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(
        "dit_accel.sampling.batches.run_batch", lambda *_: pytest.fail("made again")
    )
    again = evaluate(wan, folder)
    assert again == results
    assert {x: x.stat().st_mtime_ns for x in before if x != grid} == {
        x: y for x, y in before.items() if x != grid
    }
    assert installation_of(wan) is None


def test_a_killed_run_goes_on(wan, wan_repository, tmp_path, results):
    """6 calls make the samples of 3 methods, 4 are warm-ups; it dies in the third that is measured."""
    command = [sys.executable, str(Path(__file__).with_name("run_worker.py"))]
    done = subprocess.run(
        [*command, str(wan_repository), str(tmp_path)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "DIE_AT": "13"},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "results.json").exists()
    made = {x: x.stat().st_mtime_ns for x in tmp_path.rglob("0000.png")}
    assert made
    log = tmp_path / "timings.json"
    kept = json.loads(log.read_text())["calls"]
    assert sum(map(len, kept.values())) == 2
    again = evaluate(wan, tmp_path, methods=FEW)
    assert {x: x.stat().st_mtime_ns for x in made} == made
    after = json.loads(log.read_text())["calls"]
    for name, earlier in kept.items():
        assert after[name][: len(earlier)] == earlier
    metrics = {name: x["metrics"] for name, x in rows_of(again).items()}
    whole = {name: x["metrics"] for name, x in rows_of(results).items()}
    assert set(metrics) == {"Dense", "Dense, 1 step", "RAS", "SLA"}
    for name in metrics:
        assert metrics[name] == whole[name]


def test_what_diffusers_lacks_is_a_row_that_says_so(sd3, tmp_path):
    results = evaluate(
        sd3,
        tmp_path,
        prompts=[PromptRecord("a", "a red circle"), PromptRecord("b", "a blue square")],
        sampling=Sampling(height=64, width=64, num_inference_steps=2, guidance_scale=1.0),
        methods=["fewer_steps:1", "faster_cache", "sla"],
        repeats=1,
        batch_size=2,
    )
    rows = rows_of(results)
    assert not rows["FasterCache"]["available"]
    assert "guidance_scale=1.0" in rows["FasterCache"]["why"]
    assert "not available" in (tmp_path / "table.md").read_text()
    # Prompts of the demo: the judge looks at them, and features are compared with dense ones.
    assert rows["Dense"]["metrics"]["judge"]["n"] == 2
    assert "fd_tiny_to_dense" not in rows["Dense"]["metrics"]
    distance = rows["SLA"]["metrics"]["fd_tiny_to_dense"]
    assert distance["value"] > 0
    assert distance["n_reference"] == 2
    assert [x["num_inference_steps"] for x in rows_of(results, "fewer_steps").values()] == [1]
    assert results["samples"][0]["media"]["SLA"] == "sla/a.png"


def test_a_reference_of_real_pictures_is_what_distances_mean(sd3, tmp_path, write_images, stills):
    real = write_images(tmp_path / "real", stills(6)[0])
    options = {
        "prompts": number_prompts(["a red circle", "a blue square"]),
        "sampling": Sampling(height=64, width=64, num_inference_steps=2, guidance_scale=1.0),
        "methods": ["ras"],
        "repeats": 1,
        "reference": real,
    }
    wanted = ["fd_tiny", "fd_tiny_to_dense", "psnr"]
    results = evaluate(sd3, tmp_path / "out", metrics=wanted, **options)
    dense, ras = results["rows"]
    assert list(dense["metrics"]) == ["fd_tiny"]
    expected = score(tmp_path / "out/dense", reference=real, metrics=["fd_tiny"], progress=False)
    assert dense["metrics"]["fd_tiny"] == expected["fd_tiny"]
    assert dense["metrics"]["fd_tiny"]["n_reference"] == 6
    assert set(ras["metrics"]) == {"psnr", "fd_tiny", "fd_tiny_to_dense"}
    with pytest.raises(ValueError, match=r"reference.*inception"):
        evaluate(sd3, tmp_path / "none", metrics=["psnr"], **options)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["first_block_cache:0.9", "sea_cache:9"])
def test_a_step_cache_forgets_a_sample_before_the_next(wan, tmp_path, name):
    cache, value = read_cache(name)
    config = cache.config(wan, SAMPLING.num_inference_steps, value)
    prompts = [PromptRecord(x.id, x.prompt, seed=i) for i, x in enumerate(PROMPTS)]
    options = {"model": "x", "sampling": SAMPLING, "progress": False}
    made = {
        where: generate(wan, them, output_dir=tmp_path / where, cache=cache, **options)
        for where, them, cache in (
            ("both", prompts, config),
            ("alone", prompts[1:], config),
            ("dense", prompts[1:], None),
        )
    }
    found = {where: x.manifest["samples"]["b"]["sha256"] for where, x in made.items()}
    assert found["both"] == found["alone"] != found["dense"]


def planned(prompts, kind="images", frames=1):
    files = {f"{i}": tuple(Path(str(k)) for k in range(frames)) for i in range(len(prompts))}
    return SampleSet(Path(), kind, files, {f"{i}": x for i, x in enumerate(prompts)})


def test_metrics_fit_what_is_sampled():
    demo, other = ["a red circle", "a blue square"], ["a cat", "a dog"]

    def chosen(samples, networks=None):
        found = choose_metrics(samples, None, networks=networks or Networks())
        return found.paired, found.alone, found.to_dense

    assert chosen(planned(demo)) == (("psnr", "ssim"), ("judge",), ("fd_tiny",))
    assert chosen(planned(demo[:1])) == (("psnr", "ssim"), ("judge",), ())  # no set of one picture
    assert chosen(planned(other)) == (("psnr", "ssim"), (), ())
    assert chosen(planned(other, "clips", 5)) == (("psnr", "ssim"), ("flicker",), ())
    assert chosen(planned(other, "clips", 1)) == (("psnr", "ssim"), (), ())
    networks = Networks(inception=Path("i"), clip="c", lpips=Path("l"))
    assert chosen(planned(other), networks) == (
        ("psnr", "ssim", "lpips"),
        ("clip_score",),
        ("fid",),
    )


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ([], r"metrics=\[\]"),
        (["pnsr"], "'pnsr'.*psnr"),
        (["fid"], "'fid'.*inception"),
        (["lpips"], "'lpips'.*lpips="),
        (["clip_score"], "'clip_score'.*clip"),
        (["psnr_to_dense"], "'psnr_to_dense'.*'psnr'"),
        (["recall_tiny"], "'recall_tiny'.*4"),
    ],
    ids=str,
)
def test_metrics_that_cannot_be_measured_are_refused_early(metrics, message):
    with pytest.raises(ValueError, match=message):
        choose_metrics(planned(["a", "b"]), metrics, networks=Networks())


BAD = {
    "repeats": ({"repeats": 0}, "repeats=0"),
    "shown": ({"shown": -1}, "shown=-1"),
    "prompts": ({"prompts": []}, "prompts="),
    "ids": ({"prompts": PROMPTS[:1] * 2}, "prompts.*id"),
    "size": ({"sampling": SAMPLING.overridden(height=33)}, "height=33"),
    "method": ({"methods": ["slaa"]}, "methods.*'slaa'"),
    "steps": ({"methods": ["fewer_steps:3"]}, "'Dense, 3 steps'.*num_inference_steps=3"),
    "setting": (
        {"methods": ["ras_sla"], "ras": RASConfig(ratio=0.5, kv_cache="fp8")},
        "kv_cache='fp8'",
    ),
    "metric": ({"metrics": ["pnsr"]}, "'pnsr'.*psnr"),
    "reference": ({"reference": "none/here"}, "path='none/here'"),
    "weights": ({"networks": Networks(inception=Path("no.pth"))}, "inception='no.pth'"),
    "folder": ({"output_dir": "/proc/none/out"}, "output_dir='/proc/none"),
    "batch": ({"batch_size": 0}, "batch_size=0"),
    "fps": ({"fps": 0}, "fps=0"),
}


@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_before_any_work(
    wan, tmp_path, changed, message, monkeypatch, unchecked
):
    monkeypatch.setattr(timing_module, "run_batch", lambda *_: pytest.fail("it worked"))
    monkeypatch.setattr("dit_accel.sampling.batches.run_batch", lambda *_: pytest.fail("it worked"))
    with pytest.raises(ValueError, match=message):
        evaluate(wan, changed.pop("output_dir", tmp_path), **changed)
    assert not any(x.is_file() for x in tmp_path.rglob("*"))
    assert installation_of(wan) is None


def test_it_is_no_job_for_several_processes(wan, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE.*eval generate"):
        evaluate(wan, tmp_path)


def test_a_pipeline_that_is_accelerated_already_is_refused(wan, tmp_path):
    control.enable(wan, ras="balanced")
    try:
        with pytest.raises(ValueError, match="pipe: ras is on"):
            evaluate(wan, tmp_path)
    finally:
        control.disable(wan)


def test_samples_of_other_settings_are_not_mixed(wan, folder, results):
    before = (folder / "results.json").read_bytes()
    with pytest.raises(ValueError, match=r"guidance_scale.*1\.0"):
        evaluate(wan, folder, sampling=SAMPLING.overridden(guidance_scale=2.0))
    assert (folder / "results.json").read_bytes() == before
