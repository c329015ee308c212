"""`dit-accel eval`: what each sub-command writes, prints and exits with."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dit_accel.eval.results.store import read_results
from dit_accel.sampling.sets import SampleSet

from ..eval.example_report import example_results, write_media
from .test_cli import SMALL, run

PROMPTS = [{"id": "a", "prompt": "a red circle"}, {"id": "b", "prompt": "a blue square", "seed": 9}]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in PROMPTS))
    return path


@pytest.fixture
def pictures(tmp_path):
    """`pictures(name, noise)`: a folder of four pictures, noisier ones of the same."""

    def write(name, noise=0, count=4):
        folder = tmp_path / name
        folder.mkdir()
        rng = np.random.default_rng(0)
        for i in range(count):
            clean = rng.integers(40, 200, (32, 32, 3))
            noisy = clean + noise * np.random.default_rng(i).integers(-1, 2, clean.shape)
            Image.fromarray(noisy.astype(np.uint8)).save(folder / f"{i}.png")
        return folder

    return write


def printed(capsys):
    return json.loads(capsys.readouterr().out)


def generate(repository, prompts, out, *more):
    return run(
        "eval", "generate", "--model", repository, "--prompts", prompts, *SMALL,
        "--output-dir", out, "--fps", 8, *more,
    )  # fmt: skip


def test_generate_makes_a_set_and_goes_on(wan_repository, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    assert generate(wan_repository, prompts, out, "--limit", 1) == 0
    assert capsys.readouterr().out == f"{out}: 1 clips\n"
    assert generate(wan_repository, prompts, out) == 2  # other prompts are other settings
    assert "the prompts are others" in capsys.readouterr().err
    cache = ["--cache", "first_block_cache:0.2", "--overwrite", "--format", "json"]
    assert generate(wan_repository, prompts, out, *cache) == 0
    done = printed(capsys)
    assert done == {"output_dir": str(out), "complete": True, "kind": "clips", "samples": 2}
    manifest = SampleSet.open(out).manifest
    assert manifest["acceleration"]["cache"] == {"name": "FirstBlockCache", "threshold": 0.2}
    assert manifest["acceleration"]["sla"] is None
    assert [x["seed"] for x in manifest["samples"].values()] == [0, 9]


def test_generate_in_two_processes_makes_the_same_set(wan_repository, prompts, tmp_path):
    assert generate(wan_repository, prompts, tmp_path / "one", "--format", "json") == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command += ["-m", "dit_accel.cli", "eval", "generate", "--model", str(wan_repository), *SMALL]
    command += ["--prompts", str(prompts), "--output-dir", str(tmp_path / "two"), "--fps", "8"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, two = (SampleSet.open(tmp_path / x) for x in ("one", "two"))
    assert one.manifest["shards"] == 1
    assert two.manifest["shards"] == 2
    assert one.ids == two.ids == ("a", "b")
    for name in one.ids:
        np.testing.assert_array_equal(one.frames(name), two.frames(name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "none.txt"], "prompts='none.txt': no such file"),
        (["--limit", "0"], "limit=0"),
        (["--cache", "teacache"], "cache='teacache': accepted are none, first_block_cache"),
        (["--cache", "sea_cache:x"], "accepted is a threshold"),
        (["--cache", "sea_cache", "--batch-size", "2"], "batch_size=2"),
        (["--layout", "vbench", "--samples-per-prompt", "0"], "samples_per_prompt=0"),
        (["--sla", "fats"], "did you mean 'fast'"),
        (["--height", "33"], "height=33"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_generate_refuses_bad_input(
    wan_repository, prompts, tmp_path, arguments, message, capsys, unchecked
):
    assert generate(wan_repository, prompts, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not any((tmp_path / "out").glob("*"))


def test_step_caches_are_refused_where_diffusers_has_none(prompts, tmp_path, capsys):
    call = [
        "eval",
        "generate",
        "--model",
        "tiny-sd3",
        "--prompts",
        prompts,
        "--output-dir",
        tmp_path,
    ]
    assert run(*call, "--cache", "sea_cache") == 2
    assert "not in diffusers for SD3Transformer2DModel" in capsys.readouterr().err


def test_score_prints_figures_and_judges_conditions(pictures, tmp_path, capsys):
    clean, noisy = pictures("clean"), pictures("noisy", 8)
    call = ["eval", "score", noisy, "--reference", clean, "--metrics", "psnr", "ssim"]
    output = tmp_path / "figures.json"
    assert run(*call, "--output", output) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [x.split()[0] for x in lines] == ["psnr", "ssim"]
    figures = json.loads(output.read_text())["figures"]
    value = figures["psnr"]["value"]
    assert 25 < value < 35
    assert f"{value:.2f} dB" in lines[0]
    assert run(*call, "--format", "json") == 0
    assert printed(capsys)["figures"] == figures
    assert run(*call, "--fail_if", "psnr<20", "--fail-if", "ssim<0.1") == 0
    capsys.readouterr()
    assert run(*call, "--fail_if", "psnr<20", "--fail_if", "psnr<40", "--fail_if", "ssim<2") == 3
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("fail_if:")]
    assert len(errors) == 2
    assert errors[0] == f"fail_if: psnr is {value:.6g}, fails < 40"


def test_identical_sets_pass_any_lower_limit_of_psnr(pictures, capsys):
    clean, again = pictures("clean"), pictures("again")
    call = ["eval", "score", again, "--reference", clean, "--metrics", "psnr"]
    assert run(*call, "--fail_if", "psnr<1000") == 0
    assert "identical" in capsys.readouterr().out
    assert run(*call, "--fail_if", "psnr>1000") == 3


def test_parts_of_a_measurement_give_the_figures_of_the_whole(pictures, tmp_path, capsys):
    clean, noisy = pictures("clean"), pictures("noisy", 30)
    call = ["eval", "score", noisy, "--reference", clean, "--metrics", "psnr", "fd_tiny"]
    assert run(*call, "--format", "json") == 0
    whole = printed(capsys)["figures"]
    parts = [tmp_path / f"part{i}.safetensors" for i in range(2)]
    for i, part in enumerate(parts):
        assert run(*call, "--shard", f"{i}/2", "--save", part) == 0
    capsys.readouterr()
    assert run("eval", "score", "--parts", *parts, "--format", "json") == 0
    merged = printed(capsys)["figures"]
    assert merged["psnr"] == whole["psnr"]
    assert merged["fd_tiny"]["value"] == pytest.approx(whole["fd_tiny"]["value"], rel=1e-6)
    # A part is not the whole, and what was to be measured is settled.
    assert run("eval", "score", "--parts", parts[0]) == 2
    assert "parts: 1/2 of the measurement missing" in capsys.readouterr().err
    assert run("eval", "score", "--parts", *parts, "--reference", clean) == 2
    assert f"reference='{clean}': accepted when the parts are measured" in capsys.readouterr().err


def test_a_saved_measurement_is_a_reference(pictures, tmp_path, capsys):
    clean, noisy, saved = pictures("clean"), pictures("noisy", 30), tmp_path / "clean.safetensors"
    assert run("eval", "score", clean, "--metrics", "fd_tiny", "--save", saved) == 0
    assert capsys.readouterr().out == f"{saved}\n"
    for reference in (clean, saved):
        call = ["eval", "score", noisy, "--reference", reference, "--metrics", "fd_tiny"]
        assert run(*call, "--format", "json") == 0
    first, second = capsys.readouterr().out.split("}\n{")
    a, b = json.loads(first + "}"), json.loads("{" + second)
    assert a["figures"]["fd_tiny"]["value"] == pytest.approx(
        b["figures"]["fd_tiny"]["value"], rel=1e-9
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "images, parts: give one of the two"),
        (["clean", "--parts", "x.safetensors"], "images, parts: give one of the two"),
        (["none"], "accepted is a folder"),
        (["clean"], "nothing can be measured of this set alone"),
        (["clean", "--metrics", "fid"], "needs inception"),
        (["clean", "--metrics", "pnsr"], "'pnsr' is none"),
        (["clean", "--metrics", "fd_tiny"], "needs a reference"),
        (["clean", "--fail_if", "psnr<"], "fail_if='psnr<'"),
        (["clean", "--fail_if", "pnsr<3"], "there is no figure 'pnsr'"),
        (["clean", "--shard", "2/2", "--save", "x.safetensors"], "shard='2/2'"),
        (["clean", "--shard", "0/2"], "accepted with save"),
        (["clean", "--save", "x.bin"], "save='x.bin'"),
        (["--parts", "clean/0.png"], "not a readable safetensors file"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_score_refuses_bad_input(pictures, tmp_path, arguments, message, capsys, monkeypatch):
    pictures("clean")
    monkeypatch.chdir(tmp_path)
    assert run("eval", "score", *arguments) == 2
    assert message in capsys.readouterr().err
    assert [x.name for x in tmp_path.iterdir()] == ["clean"]


def test_a_missing_library_is_one_line(pictures, tmp_path, capsys, monkeypatch):
    def broken(module, package):
        raise ImportError(f"{package} cannot be imported; install it")

    monkeypatch.setattr("dit_accel.eval.metrics.pairs.import_library", broken)
    monkeypatch.setattr("dit_accel.eval.metrics.pairs.check_known", lambda *_: True)
    weights = tmp_path / "alex.safetensors"
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1)}, weights)
    clean, noisy = pictures("clean"), pictures("noisy", 8)
    call = ["eval", "score", noisy, "--reference", clean, "--metrics", "lpips", "--lpips", weights]
    assert run(*call) == 1
    assert "failed: lpips cannot be imported" in capsys.readouterr().err


@pytest.fixture
def evaluated(tmp_path):
    folder = tmp_path / "evaluated"
    folder.mkdir()
    results = example_results()
    results["samples"] = write_media(folder, results, count=1, kind="png")
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_report_writes_its_files_and_judges_conditions(evaluated, capsys):
    assert run("eval", "report", evaluated, "--title", "mine") == 0
    out = capsys.readouterr().out
    assert "RAS balanced" in out
    for name in ("table.md", "report.html", "grid.png"):
        assert str(evaluated / name) in out
        assert (evaluated / name).stat().st_size > 100
    assert "# mine" in (evaluated / "table.md").read_text()
    assert run("eval", "report", evaluated, "--no-overwrite") == 2
    assert "already holds" in capsys.readouterr().err
    assert run("eval", "report", evaluated, "--format", "json") == 0
    assert printed(capsys) == read_results(evaluated)
    assert run("eval", "report", evaluated, "--fail_if", "RAS + SLA: psnr<25") == 0
    assert run("eval", "report", evaluated, "--fail_if", "RAS + SLA: psnr<30") == 3
    assert "fail_if: RAS + SLA: psnr is 26.3, fails < 30" in capsys.readouterr().err
    # A figure that is not there is no pass.
    page = (evaluated / "report.html").read_bytes()
    assert run("eval", "report", evaluated, "--title", "new", "--fail_if", "cost>3") == 2
    assert "cost of row" in capsys.readouterr().err
    assert (evaluated / "report.html").read_bytes() == page
    assert run("eval", "report", evaluated / "none") == 2


def test_run_makes_sets_table_and_page(wan_repository, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dit_accel.eval.runs.peak_memory.gc.collect", lambda: 0)
    out = tmp_path / "out"
    call = ["eval", "run", "--model", wan_repository, "--prompts", prompts, *SMALL]
    call += ["--methods", "fewer_steps:1", "sla", "--crossover", "never", "--repeats", 1]
    call += ["--output-dir", out]
    assert run(*call) == 0
    found = capsys.readouterr()
    assert "SLA balanced" in found.out
    assert str(out / "report.html") in found.out
    assert "generating" in found.err
    results = read_results(out)
    assert [x["name"] for x in results["rows"]] == ["Dense", "Dense, 1 step", "SLA balanced"]
    assert results["rows"][-1]["settings"]["sla"]["crossover"] == "never"
    assert run(*call, "--format", "json", "--fail_if", "Dense, 1 step: psnr<99") == 3
    found = capsys.readouterr()
    assert json.loads(found.out) == results
    assert "fail_if: Dense, 1 step: psnr is" in found.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fail_if", "psnr!25"], "fail_if='psnr!25'"),
        (["--fail_if", "pnsr<25"], "there is no figure 'pnsr'"),
        (["--methods", "slaa"], "'slaa' is none"),
        (["--methods", "sla:fats"], "did you mean 'fast'"),
        (["--metrics", "fid"], "needs inception"),
        (["--inception", "none.pth"], "inception='none.pth'"),
        (["--reference", "none"], "path='none'"),
        (["--prompts", "none"], "prompts='none'"),
        (["--repeats", "0"], "repeats=0"),
        (["--fail_if", "lpips>1"], "there will be no figure 'lpips'"),
        (["--methods", "sla", "--fail_if", "RAS: psnr<1"], "there will be no row 'RAS'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_run_refuses_bad_input_before_any_work(
    wan_repository, prompts, tmp_path, arguments, message, capsys, unchecked
):
    out = tmp_path / "out"
    call = ["eval", "run", "--model", wan_repository, "--prompts", prompts, *SMALL]
    assert run(*call, "--output-dir", out, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not out.exists() or not any(out.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "x"],
        ["--methods", "sla"],
        ["--prompts", "demo"],
        ["--height", "32"],
        ["--title", "x"],
    ],
    ids=lambda x: x[0],
)
def test_a_preset_decides_itself(tmp_path, arguments, capsys):
    assert run("eval", "run", "--preset", "demo", "--output-dir", tmp_path / "out", *arguments) == 2
    assert "preset='demo': decides on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["score", "report", "run"])
def test_help_says_what_exit_codes_mean(command, capsys):
    for arguments in ([], ["eval", command]):
        assert run(*arguments, "--help") == 0
        text = " ".join(capsys.readouterr().out.replace("│", " ").split())
        for meaning in (
            "0 done",
            "1 failed while running",
            "2 bad input",
            "3 a --fail_if condition holds",
            "130 interrupted",
        ):
            assert meaning in text
    assert run("eval", "--help") == 0


def test_an_interrupt_exits_with_130(pictures, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dit_accel.eval.metrics.score.measure", interrupted)
    assert run("eval", "score", pictures("clean"), "--metrics", "flicker") == 130
    assert "interrupted" in capsys.readouterr().err
