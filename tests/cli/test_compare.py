"""`dit-accel compare`: files and metrics, and input that is refused."""

import pytest

from dit_accel.eval import read_results
from dit_accel.eval.metrics.pairs import psnr
from dit_accel.finetune.result import write_result
from dit_accel.sampling.call import run_batch
from dit_accel.sampling.plan import plan_samples
from dit_accel.sampling.prompts import number_prompts
from dit_accel.sampling.settings import Sampling

from ..finetune.test_result import settings, trained
from .command import SMALL, run

FILES = {"dense.mp4", "sparse.mp4", "side_by_side.mp4", "contact_sheet.png", "results.json"}


def test_compare_writes_clips_pictures_and_metrics(wan_repository, tmp_path, small_blocks, capsys):
    out = tmp_path / "out"
    arguments = [
        "compare",
        "a red circle",
        "--model",
        wan_repository,
        *SMALL,
        "--sla",
        small_blocks,
    ]
    arguments += ["--output-dir", out]
    assert run(*arguments) == 0
    printed = capsys.readouterr().out
    assert "calls dense: " in printed
    dense, sparse = read_results(out)["rows"]
    assert {p.name for p in out.iterdir()} == FILES
    assert sparse["metrics"]["psnr"]["value"] > 10
    assert sparse["metrics"]["ssim"]["value"] <= 1
    assert 0.5 <= sparse["density"] < 1
    assert dense["seconds"]["denoise"]["median"] > 0
    before = (out / "results.json").read_bytes()
    assert run(*arguments) == 2
    assert (out / "results.json").read_bytes() == before
    assert "output_dir" in capsys.readouterr().err
    assert run("eval", "report", out) == 0
    assert (out / "report.html").exists()


def test_compare_with_fewer_steps_and_conditions(wan_repository, tmp_path, small_blocks, capsys):
    out = tmp_path / "out"
    arguments = ["compare", "a red circle", "--model", wan_repository, *SMALL]
    arguments += ["--num-inference-steps", "3", "--sla", small_blocks, "--output-dir", out]
    more = ["--methods", "fewer_steps:2", "first_block_cache:0.1", "--repeats", 2]
    assert run(*arguments, *more, "--fail-if", "ssim<0") == 0
    printed = capsys.readouterr().out
    results = read_results(out)
    dense, fewer, cache, sparse = results["rows"]
    kinds = ["dense", "fewer_steps", "cache", "sla"]
    assert [x["method"] for x in results["rows"]] == kinds
    assert "Dense, 2 steps" in printed
    assert "Decode s" in printed
    assert fewer["num_inference_steps"] == 2
    assert fewer["metrics"]["psnr"]["value"] > 0
    assert cache["settings"]["cache"]["threshold"] == 0.1
    assert {p.name for p in out.iterdir()} == {
        *FILES, "dense-2-steps.mp4", "firstblockcache-0.1.mp4",
    }  # fmt: skip
    for row in (dense, sparse):
        assert row["seconds"]["total"]["n"] == results["repeats"] == 2
    # Clips of methods that are not asked for again go; what fails is written all the same.
    again = [*arguments, "--overwrite", "--fail-if", "psnr<1000", "--fail-if", "speedup_total<1000"]
    assert run(*again) == 3
    assert capsys.readouterr().err.count("fail_if: SLA: ") == 2
    assert {p.name for p in out.iterdir()} == FILES
    assert [x["method"] for x in read_results(out)["rows"]] == ["dense", "sla"]


@pytest.mark.parametrize("kind", ["lora", "all"])
def test_a_fine_tuned_result_is_compared_with_the_dense_base_model(
    sparse_wan, wan, wan_repository, tmp_path, kind
):
    tuned, folder, out = trained(sparse_wan, kind), tmp_path / "tuned", tmp_path / "out"
    write_result(tuned, settings(wan_repository, kind), folder)
    arguments = ["compare", "a red circle", "--model", wan_repository, *SMALL]
    arguments += ["--height", "64", "--width", "64", "--sla", folder, "--output-dir", out]
    assert run(*arguments, "--methods", "sla:fast", f"sla:{folder}") == 0
    results = read_results(out)
    _, fast, named, sparse = results["rows"]
    assert [x["name"] for x in results["rows"]] == ["Dense", "SLA fast", "SLA tuned", "SLA"]
    sampling = Sampling(**{k: x for k, x in results["sampling"].items() if k != "seed"})
    samples = plan_samples(
        number_prompts(["a red circle"]), sampling, seed=0, count=1, layout="ids"
    )
    frames = [run_batch(pipe, samples).frames[0] for pipe in (wan, tuned)]
    expected = psnr(*frames)
    assert sparse["metrics"]["psnr"]["value"] == pytest.approx(expected, rel=1e-3)
    assert named["metrics"]["psnr"]["value"] == sparse["metrics"]["psnr"]["value"] < 60
    # Weights go back after each call: this method runs those of the base model, dense at this size.
    assert fast["metrics"]["psnr"]["value"] is None
    assert "transformer_sha256" in sparse["settings"]["sla"]
    assert "transformer_sha256" not in fast["settings"]["sla"]


def test_comparison_of_equal_clips_has_no_finite_psnr(wan_repository, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        run("compare", "a red circle", "--model", wan_repository, *SMALL, "--output-dir", out) == 0
    )
    assert "identical" in capsys.readouterr().out  # preset "balanced" is dense at this size
    assert read_results(out)["rows"][-1]["metrics"]["psnr"]["value"] is None


def test_compare_with_region_adaptive_sampling(wan_repository, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["compare", "a red circle", "--model", wan_repository, *SMALL, "--output-dir", out]
    arguments += ["--num-inference-steps", "9", "--height", "64", "--width", "64"]
    assert run(*arguments, "--sla", "none", "--ras", "balanced") == 0
    assert "Cost dense steps" in capsys.readouterr().out
    row = read_results(out)["rows"][-1]
    assert row["method"] == "ras"
    assert 0 < row["cost"] < 9
    assert row["metrics"]["psnr"]["value"] is not None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--repeats", "0"], "repeats=0"),
        (["--num-inference-steps", "0"], "num_inference_steps=0"),
        (["--guidance-scale", "nan"], "guidance_scale=nan"),
        (["--seed", "-1"], "seed=-1"),
        (["--seed", str(2**63)], f"seed={2**63}"),
        (["--fps", "nan"], "fps=nan"),
        (["--height", "0"], "height=0"),
        (["--height", "60"], "height=60"),
        (["--num-frames", "6"], "num_frames=6"),
        (["--device", "cuda:99"], "device='cuda:99'"),
        (["--max-sequence-length", "99999999"], "max_sequence_length=99999999"),
        (["--sla", "none"], "sla=None"),
        (["--sla", "fats"], "sla='fats'"),
        (["--methods", "slaa"], "'slaa'"),
        (["--methods", "sla:fats"], "'fats'"),
        (["--methods", "sea_cache:x"], "'sea_cache:x'"),
        (["--methods", "fewer_steps:2"], "num_inference_steps=2"),
        (["--methods", "ras", "ras"], "'RAS balanced'"),
        (["--fail-if", "psnr"], "fail_if='psnr'"),
        (["--fail-if", "pnsr<3"], "'pnsr'"),
        (["--fail_if", "psnr<nan"], "fail_if='psnr<nan'"),
        (["--model", "/no/such/folder"], "model='/no/such/folder'"),
        (["--output-dir", "/proc/none/out"], "output_dir='/proc/none/out'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_bad_value_is_refused_before_the_model_is_loaded(
    refused, wan_repository, arguments, named
):
    call = ["compare", "a red circle", "--model", wan_repository, *SMALL, "--output-dir", "out"]
    assert named in refused(*call, *arguments)


def test_an_empty_prompt_is_refused(refused):
    for prompt in ("", "  "):
        assert f"prompt={prompt!r}" in refused("compare", prompt)


def test_an_earlier_comparison_is_not_replaced(refused, wan_repository, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("{}")
    call = ["compare", "x", "--model", wan_repository, *SMALL, "--output-dir", "out"]
    assert "output_dir='out'" in refused(*call)
