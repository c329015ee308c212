"""`dit-accel eval run`."""

import json

import pytest

from dit_accel.cli.eval_run import DEMO
from dit_accel.eval.results.store import read_results
from dit_accel.files import EMBEDDED_MODELS

from .command import SMALL, run


def test_run_makes_sets_table_and_page(wan_repository, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dit_accel.eval.runs.timing.gc.collect", lambda: 0)
    out = tmp_path / "out"
    call = ["eval", "run", "--model", wan_repository, "--prompts", prompts, *SMALL]
    call += ["--methods", "fewer_steps:1", "sla", "--crossover", "never", "--repeats", 1]
    call += ["--output-dir", out, "--fine-steps", 3]
    assert run(*call) == 0
    found = capsys.readouterr()
    assert "SLA balanced" in found.out
    assert str(out / "report.html") in found.out
    assert "generating" in found.err
    results = read_results(out)
    assert [x["name"] for x in results["rows"]] == ["Dense", "Dense, 1 step", "SLA balanced"]
    assert results["fine"]["num_inference_steps"] == 3
    assert results["rows"][-1]["settings"]["sla"]["crossover"] == "never"
    assert run(*call, "--format", "json", "--fail-if", "Dense, 1 step: psnr<99") == 3
    found = capsys.readouterr()
    assert json.loads(found.out) == results
    assert "fail_if: Dense, 1 step: psnr is" in found.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--fail-if", "psnr!25"], "fail_if='psnr!25'"),
        (["--fail-if", "pnsr<25"], "'pnsr'"),
        (["--fail-if", "lpips>1"], "'lpips'"),
        (["--methods", "sla", "--fail-if", "RAS: psnr<1"], "'RAS'"),
        (["--methods", "slaa"], "'slaa'"),
        (["--methods", "sla:fats"], "'fats'"),
        (["--methods", "sla:none"], "'sla:none'"),
        (["--methods", "fewer_steps:2"], "num_inference_steps=2"),
        (["--methods", "sea_cache:x"], "'sea_cache:x'"),
        (["--fine-steps", "2"], "fine_steps=2"),
        (["--fine-steps", "-1"], "fine_steps=-1"),
        (["--fine-steps", "9", "--metrics", "flicker"], "fine_steps"),
        (["--metrics", "fid"], "inception"),
        (["--metrics", "pnsr"], "'pnsr'"),
        (["--inception", "none.pth"], "inception='none.pth'"),
        (["--lpips", "none.pth"], "lpips='none.pth'"),
        (["--reference", "none"], "'none'"),
        (["--prompts", "none"], "prompts='none'"),
        (["--limit", "0"], "limit=0"),
        (["--repeats", "0"], "repeats=0"),
        (["--batch-size", "0"], "batch_size=0"),
        (["--shown", "-1"], "shown=-1"),
        (["--fps", "nan"], "fps=nan"),
        (["--seed", "-1"], "seed=-1"),
        (["--height", "60"], "height=60"),
        (["--num-inference-steps", "0"], "num_inference_steps=0"),
        (["--guidance-scale", "nan"], "guidance_scale=nan"),
        (["--device", "cuda:99"], "device='cuda:99'"),
        (["--model", "/no/such/folder"], "model='/no/such/folder'"),
        (["--output-dir", "/proc/none/out"], "output_dir='/proc/none/out'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_bad_value_is_refused_before_the_model_is_loaded(
    refused, wan_repository, prompts, arguments, named
):
    call = ["eval", "run", "--model", wan_repository, "--prompts", prompts, *SMALL]
    assert named in refused(*call, "--output-dir", "out", *arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "x"], "model"),
        (["--methods", "sla"], "methods"),
        (["--prompts", "demo"], "prompts"),
        (["--height", "32"], "sampling"),
        (["--title", "x"], "title"),
        (["--repeats", "0"], "repeats=0"),
        (["--limit", "0"], "limit=0"),
        (["--num-inference-steps", "0"], "num_inference_steps=0"),
        (["--num-inference-steps", "1"], "num_inference_steps=1"),
        (["--fine-steps", "15"], "fine_steps=15"),
        (["--fps", "0"], "fps=0.0"),
        (["--device", "cuda:99"], "device='cuda:99'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_preset_decides_itself_and_checks_the_rest(refused, arguments, named):
    assert named in refused("eval", "run", "--preset", "demo", "--output-dir", "out", *arguments)


def test_the_demo_evaluates_the_embedded_models(tmp_path, monkeypatch):
    assert set(DEMO) == set(EMBEDDED_MODELS)
    monkeypatch.setattr("dit_accel.eval.runs.timing.gc.collect", lambda: 0)
    for model in ("tiny-wan", "tiny-lumina2"):
        monkeypatch.delitem(DEMO, model)
    call = ["eval", "run", "--preset", "demo", "--limit", 2, "--repeats", 1, "--fine-steps", 4]
    assert run(*call, "--num-inference-steps", 2, "--output-dir", tmp_path) == 0
    results = read_results(tmp_path / "tiny-sd3")
    rows = {x["name"]: x for x in results["rows"]}
    assert results["fine"] == {"num_inference_steps": 4, "folder": "dense-4-steps"}
    assert {"SeaCache", "MagCache", "TaylorSeer", "PAB", "FasterCache"} < set(rows)
    assert rows["SLA"]["settings"]["sla"]["crossover"] == "never"
    assert rows["SLA"]["settings"]["sla"]["block_q"] == 16
    assert (tmp_path / "tiny-sd3" / "report.html").stat().st_size > 10_000
