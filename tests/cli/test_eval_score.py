"""`dit-accel eval score`."""

import json

import numpy as np
import pytest

from .command import run


def printed(capsys):
    return json.loads(capsys.readouterr().out)


def test_score_prints_metrics_and_judges_conditions(pictures, tmp_path, capsys):
    clean, noisy = pictures("clean"), pictures("noisy", 8)
    call = ["eval", "score", noisy, "--reference", clean, "--metrics", "psnr", "ssim"]
    output = tmp_path / "metrics.json"
    assert run(*call, "--output", output) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [x.split()[0] for x in lines] == ["psnr", "ssim"]
    metrics = json.loads(output.read_text())["metrics"]
    value = metrics["psnr"]["value"]
    assert 25 < value < 35
    assert f"{value:.2f} dB" in lines[0]
    assert run(*call, "--format", "json") == 0
    assert printed(capsys)["metrics"] == metrics
    assert run(*call, "--fail-if", "psnr<20", "--fail-if", "ssim<0.1") == 0
    capsys.readouterr()
    assert run(*call, "--fail-if", "psnr<20", "--fail-if", "psnr<40", "--fail-if", "ssim<2") == 3
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("fail_if:")]
    assert len(errors) == 2
    assert errors[0] == f"fail_if: psnr is {value:.6g}, fails < 40"


def test_identical_sets_pass_any_lower_limit_of_psnr(pictures, capsys):
    clean, again = pictures("clean"), pictures("again")
    call = ["eval", "score", again, "--reference", clean, "--metrics", "psnr"]
    assert run(*call, "--fail-if", "psnr<1000") == 0
    assert "identical" in capsys.readouterr().out
    assert run(*call, "--fail-if", "psnr>1000") == 3


def test_parts_of_a_measurement_give_the_metrics_of_the_whole(pictures, tmp_path, capsys):
    clean, noisy = pictures("clean"), pictures("noisy", 30)
    call = ["eval", "score", noisy, "--reference", clean, "--metrics", "psnr", "fd_tiny"]
    assert run(*call, "--format", "json") == 0
    whole = printed(capsys)["metrics"]
    parts = [tmp_path / f"part{i}.safetensors" for i in range(2)]
    for i, part in enumerate(parts):
        assert run(*call, "--shard", f"{i}/2", "--save", part) == 0
    capsys.readouterr()
    assert run("eval", "score", "--parts", *parts, "--format", "json") == 0
    merged = printed(capsys)["metrics"]
    assert merged["psnr"] == whole["psnr"]
    assert merged["fd_tiny"]["value"] == pytest.approx(whole["fd_tiny"]["value"], rel=1e-6)
    # A part is not the whole, and what was to be measured is settled.
    assert run("eval", "score", "--parts", parts[0]) == 2
    assert "parts: 1/2 of the measurement missing" in capsys.readouterr().err
    assert run("eval", "score", "--parts", *parts, "--reference", clean) == 2
    assert f"reference='{clean}': must be given when the parts" in capsys.readouterr().err


def test_a_saved_measurement_is_a_reference(pictures, tmp_path, capsys):
    clean, noisy, saved = pictures("clean"), pictures("noisy", 30), tmp_path / "clean.safetensors"
    assert run("eval", "score", clean, "--metrics", "fd_tiny", "--save", saved) == 0
    assert capsys.readouterr().out == f"{saved}\n"
    for reference in (clean, saved):
        call = ["eval", "score", noisy, "--reference", reference, "--metrics", "fd_tiny"]
        assert run(*call, "--format", "json") == 0
    first, second = capsys.readouterr().out.split("}\n{")
    a, b = json.loads(first + "}"), json.loads("{" + second)
    assert a["metrics"]["fd_tiny"]["value"] == pytest.approx(
        b["metrics"]["fd_tiny"]["value"], rel=1e-9
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "images"),
        (["clean", "--parts", "x.safetensors"], "parts"),
        (["none"], "'none'"),
        (["clean"], "nothing can be measured"),
        (["clean", "--metrics", "fid"], "inception"),
        (["clean", "--metrics", "pnsr"], "'pnsr'"),
        (["clean", "--metrics", "fd_tiny"], "reference"),
        (["clean", "--reference", "none", "--metrics", "psnr"], "'none'"),
        (["clean", "--fail-if", "psnr<"], "fail_if='psnr<'"),
        (["clean", "--fail-if", "pnsr<3"], "'pnsr'"),
        (["clean", "--shard", "2/2", "--save", "new/x.safetensors"], "shard='2/2'"),
        (["clean", "--shard", "0/2"], "shard='0/2'"),
        (["clean", "--shard", "nan/2", "--save", "x.safetensors"], "shard='nan/2'"),
        (["clean", "--save", "x.bin"], "save='x.bin'"),
        (["clean", "--metrics", "flicker", "--output", "/proc/none/x.json"], "output='/proc/none'"),
        (["clean", "--batch-size", "0"], "batch_size=0"),
        (["clean", "--workers", "0"], "workers=0"),
        (["clean", "--device", "cuda:99"], "device='cuda:99'"),
        (["--parts", "clean/0.png"], "0.png"),
        (["--parts", "clean/0.png", "--output", "new/x.json"], "0.png"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_is_refused_and_nothing_is_written(refused, pictures, arguments, named):
    pictures("clean")
    assert named in refused("eval", "score", *arguments)


def test_a_missing_library_is_one_line(pictures, tmp_path, capsys, monkeypatch):
    def broken(module, package):
        raise ImportError(f"{package} cannot be imported; install it")

    monkeypatch.setattr("dit_accel.eval.metrics.pairs.import_library", broken)
    weights = tmp_path / "alex.safetensors"
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1)}, weights)
    clean, noisy = pictures("clean"), pictures("noisy", 8)
    call = ["eval", "score", noisy, "--reference", clean, "--metrics", "lpips", "--lpips", weights]
    call.append("--allow-other-weights")
    assert run(*call) == 1
    assert "failed: lpips cannot be imported" in capsys.readouterr().err
