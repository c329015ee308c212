"""The command line on a random-weight Wan: files, records, exit codes."""

import json
import subprocess
import sys

import numpy as np
import pytest

from dit_accel.cli import main

SMALL = ["--height", "32", "--width", "32", "--num-frames", "5", "--num-inference-steps", "2"]
SMALL += ["--guidance-scale", "1", "--max-sequence-length", "16"]


def run(*arguments):
    """Exit code of the command line."""
    try:
        main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.fixture
def small_blocks(tmp_path):
    path = tmp_path / "sla.yaml"
    path.write_text("sla:\n  topk: 0.5\n  block_q: 16\n  block_k: 16\n  crossover: never\n")
    return path


def test_generate_writes_clip_and_sidecar(wan_repository, tmp_path, small_blocks, capsys):
    out = tmp_path / "out"
    for _ in range(2):
        code = run(
            "generate", "a red circle", "--model", wan_repository, *SMALL,
            "--sla", small_blocks, "--seed", 3, "--output-dir", out, "--format", "json",
        )  # fmt: skip
        assert code == 0
    records = json.loads(capsys.readouterr().out.split("]\n[")[0].rstrip().removesuffix("]") + "]")
    assert sorted(p.name for p in out.iterdir()) == [
        "0000.json",
        "0000.mp4",
        "0001.json",
        "0001.mp4",
    ]
    sidecar = json.loads((out / "0000.json").read_text())
    assert sidecar["prompt"] == records[0]["prompt"] == "a red circle"
    assert sidecar["seed"] == 3
    assert sidecar["sampling"]["num_frames"] == 5
    assert sidecar["frames"] == [5, 32, 32, 3]
    assert set(sidecar["seconds"]) == {"text", "denoise", "decode", "total"}
    assert 0 < sidecar["acceleration"]["density"] < 1
    assert sidecar["versions"]["torch"]


def test_generate_reads_a_prompts_file(wan_repository, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a red circle", "seed": 9}\n{"prompt": "a blue square"}\n')
    out = tmp_path / "out"
    assert run("generate", "--prompts-file", prompts, "--model", wan_repository, *SMALL, "--kind", "png",
               "--sla", "none", "--output-dir", out) == 0  # fmt: skip
    assert len(list(out.glob("0001-*.png"))) == 5
    seeds = [json.loads((out / f"000{i}.json").read_text())["seed"] for i in range(2)]
    assert seeds == [9, 1]
    assert "a blue square" in capsys.readouterr().out


def test_prompts_have_sizes_of_their_own(wan_repository, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.csv", tmp_path / "out"
    call = ["generate", "--prompts-file", prompts, "--model", wan_repository, *SMALL]
    call += ["--sla", "none", "--output-dir", out]
    prompts.write_text("prompt,height,num_frames\na red circle,,\na blue square,48,1\n")
    assert run(*call) == 0
    frames = [json.loads((out / f"000{i}.json").read_text())["frames"] for i in range(2)]
    assert frames == [[5, 32, 32, 3], [1, 48, 32, 3]]
    before = sorted(out.iterdir())
    prompts.write_text("prompt,height\na red circle,\na blue square,50\n")
    assert run(*call) == 2
    assert "height=50: accepted are multiples of 16" in capsys.readouterr().err
    assert sorted(out.iterdir()) == before


def test_compare_writes_clips_pictures_and_figures(wan_repository, tmp_path, small_blocks, capsys):
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
    assert "density of sparse calls" in printed
    result = json.loads((out / "comparison.json").read_text())
    assert {p.name for p in out.iterdir()} == set(result["files"])
    assert result["psnr_db"] > 10
    assert result["ssim"] <= 1
    assert result["density"] == pytest.approx(0.5)
    assert result["seconds"]["dense"]["denoise"] > 0
    before = (out / "comparison.json").read_bytes()
    assert run(*arguments) == 2
    assert (out / "comparison.json").read_bytes() == before
    assert "already holds" in capsys.readouterr().err
    assert run(*arguments, "--overwrite") == 0


def test_compare_with_fewer_steps_and_conditions(wan_repository, tmp_path, small_blocks, capsys):
    out = tmp_path / "out"
    arguments = ["compare", "a red circle", "--model", wan_repository, *SMALL]
    arguments += ["--num-inference-steps", "3", "--sla", small_blocks, "--output-dir", out]
    more = ["--methods", "fewer_steps:2", "first_block_cache:0.1", "--repeats", 2]
    assert run(*arguments, *more, "--fail_if", "ssim<0") == 0
    printed = capsys.readouterr().out
    result = json.loads((out / "comparison.json").read_text())
    assert {p.name for p in out.iterdir()} == set(result["files"])
    dense, fewer, cache, sparse = result["rows"]
    kinds = ["dense", "fewer_steps", "cache", "sla"]
    assert [x["method"] for x in result["rows"]] == kinds
    assert "Dense, 2 steps" in printed
    assert fewer["num_inference_steps"] == 2
    assert fewer["metrics"]["psnr"]["value"] > 0
    assert cache["settings"]["cache"]["threshold"] == 0.1
    assert {"dense-2-steps.mp4", "firstblockcache-0.1.mp4"} < set(result["files"])
    # The figures of the comparison are those of its rows.
    assert sparse["metrics"]["psnr"]["value"] == result["psnr_db"]
    assert sparse["metrics"]["ssim"]["value"] == result["ssim"]
    for key, row in (("dense", dense), ("sparse", sparse)):
        assert row["seconds"]["total"]["median"] == result["seconds"][key]["total"]
        assert row["seconds"]["total"]["n"] == result["repeats"] == 2
    assert sparse["speedup"]["denoise"] == result["speedup_denoise"]
    assert sparse["density"] == result["overall_density"]
    # Clips of methods that are not asked for again go; what fails is written all the same.
    again = [*arguments, "--overwrite", "--fail_if", "psnr<1000", "--fail_if", "speedup_total<1000"]
    assert run(*again) == 3
    assert capsys.readouterr().err.count("fail_if: SLA: ") == 2
    result = json.loads((out / "comparison.json").read_text())
    assert {p.name for p in out.iterdir()} == set(result["files"])
    assert [x["method"] for x in result["rows"]] == ["dense", "sla"]
    assert run(*again, "--fail_if", "pnsr<3") == 2
    assert "there will be no figure 'pnsr'" in capsys.readouterr().err
    one = [*arguments, "--overwrite", "--methods", "fewer_steps", "--num-inference-steps", "1"]
    assert run(*one) == 2
    assert "num_inference_steps=1 of dense sampling are no more" in capsys.readouterr().err
    assert run(*arguments, "--overwrite", "--methods", "fewer_step") == 2
    assert "'fewer_step' is none" in capsys.readouterr().err
    assert {p.name for p in out.iterdir()} == set(result["files"])


def test_comparison_of_equal_clips_has_no_finite_psnr(wan_repository, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        run("compare", "a red circle", "--model", wan_repository, *SMALL, "--output-dir", out) == 0
    )
    assert "identical" in capsys.readouterr().out  # preset "balanced" is dense at this size
    assert json.loads((out / "comparison.json").read_text())["psnr_db"] is None


def test_env_names_versions(capsys):
    assert run("env", "--format", "json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"python", "torch", "diffusers", "processor"} <= set(facts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such/folder"], "pretrained_model_name_or_path='/no/such/folder'"),
        (["--height", "60"], "height=60: accepted are multiples of 16"),
        (["--num-frames", "6"], "num_frames=6: accepted is 4k+1"),
        (["--topk", "0"], "topk=0.0: accepted: a fraction in (0, 1]"),
        (["--sla", "fats"], "did you mean 'fast'"),
        (["--sla", "none", "--topk", ".5"], "sla='none'"),
        (["--output-dir", "/proc/none/out"], "output_dir='/proc/none/out': cannot write there"),
        (["--device", "cuda:99"], "device='cuda:99': not available here"),
        (["--fps", "0"], "fps=0.0"),
    ],
    ids=lambda x: x[0].removeprefix("--") if isinstance(x, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    wan_repository, tmp_path, capsys, arguments, message
):
    out = tmp_path / "out"
    base = ["generate", "a red circle", "--model", wan_repository, *SMALL, "--output-dir", out]
    assert run(*base, *arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert message in error[0]
    assert not out.exists() or not list(out.iterdir())


def test_unknown_yaml_keys_get_a_suggestion(wan_repository, tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text("sla:\n  topc: 0.5\n")
    assert (
        run(
            "generate",
            "x",
            "--model",
            wan_repository,
            "--sla",
            path,
            "--output-dir",
            tmp_path / "out",
        )
        == 2
    )
    assert "unknown key 'topc' (did you mean 'topk'?)" in capsys.readouterr().err


def test_generate_needs_exactly_one_kind_of_prompt(capsys):
    assert run("generate") == 2
    assert "give one of the two" in capsys.readouterr().err


def test_results_go_to_stdout_and_progress_to_stderr(wan_repository, tmp_path, small_blocks):
    command = [
        sys.executable,
        "-m",
        "dit_accel.cli",
        "generate",
        "a red circle",
        "--model",
        str(wan_repository),
    ]
    command += [
        *SMALL,
        "--sla",
        str(small_blocks),
        "--output-dir",
        str(tmp_path / "out"),
        "--format",
        "json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)[0]["prompt"] == "a red circle"
    assert "2/2" in done.stderr


def test_same_seed_gives_the_same_frames(wan_repository, tmp_path, small_blocks):
    from PIL import Image

    for name in ("a", "b"):
        assert run("generate", "a red circle", "--model", wan_repository, *SMALL, "--sla", small_blocks,
                   "--kind", "png", "--output-dir", tmp_path / name) == 0  # fmt: skip
    a, b = (np.asarray(Image.open(tmp_path / name / "0000-004.png")) for name in ("a", "b"))
    np.testing.assert_array_equal(a, b)


def test_generate_with_region_adaptive_sampling_and_its_pictures(wan_repository, tmp_path, capsys):
    out = tmp_path / "out"
    settings = tmp_path / "ras.yaml"
    settings.write_text("ras:\n  ratio: 0.5\n  warmup: 1\n  tail: 1\n  resets: []\n")
    size = ["--height", "64", "--width", "64", "--num-frames", "5", "--num-inference-steps", "4"]
    size += ["--guidance-scale", "1", "--max-sequence-length", "16"]
    call = ["generate", "a red circle", "--model", wan_repository, *size, "--output-dir", out]
    assert run(*call, "--sla", "none", "--ras", settings, "--save-focus") == 0
    assert "cost of 3.0 of 4 steps" in capsys.readouterr().out
    names = ["0000-focus.mp4", "0000-focus.png", "0000.json", "0000.mp4"]
    assert sorted(p.name for p in out.iterdir()) == names
    record = json.loads((out / "0000.json").read_text())["acceleration"]["ras"]
    assert [step["mode"] for step in record["steps"]] == ["dense", "ras", "ras", "dense"]
    assert run(*call, "--save-focus") == 2
    assert "save_focus: accepted with --ras, which is none" in capsys.readouterr().err
    assert run(*call, "--ras", "papr") == 2
    assert "did you mean 'paper'" in capsys.readouterr().err


def test_compare_with_region_adaptive_sampling(wan_repository, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["compare", "a red circle", "--model", wan_repository, *SMALL, "--output-dir", out]
    arguments += ["--num-inference-steps", "9", "--height", "64", "--width", "64"]
    assert run(*arguments, "--sla", "none", "--ras", "balanced") == 0
    assert "Cost dense steps" in capsys.readouterr().out
    result = json.loads((out / "comparison.json").read_text())
    assert result["acceleration"]["ras"]["ras_steps"] == 2
    assert result["psnr_db"] is not None
    assert run(*arguments, "--sla", "none", "--overwrite") == 2


def test_images_of_the_embedded_model(tmp_path, capsys):
    out = tmp_path / "out"
    call = ["generate", "a red circle on a teal background", "--model", "tiny-sd3"]
    call += ["--num-inference-steps", "9", "--ras", "balanced", "--output-dir", out]
    assert run(*call, "--save-focus", "--format", "json") == 0
    assert sorted(p.name for p in out.iterdir()) == ["0000-focus.png", "0000.json", "0000.png"]
    record = json.loads((out / "0000.json").read_text())
    assert record["frames"] == [1, 64, 64, 3]
    reasons = list(record["acceleration"]["dense_calls"])
    assert any(reason.startswith("crossover='auto': 256 tokens") for reason in reasons)
    compared = tmp_path / "compared"
    options = ["--num-inference-steps", "9", "--ras", "balanced", "--output-dir", compared]
    assert run("compare", *call[1:4], *options) == 0
    names = ["comparison.json", "contact_sheet.png", "dense.png", "side_by_side.png", "sparse.png"]
    assert sorted(p.name for p in compared.iterdir()) == names
    assert run(*call, "--num-frames", "5") == 2
    assert "num_frames=5: this model makes images" in capsys.readouterr().err
