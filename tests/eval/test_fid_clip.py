"""The short script: a folder in, two metrics out."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dit_accel.bench import fid_clip
from dit_accel.bench.fid_clip import FidClip, UncheckedSampling
from dit_accel.files import asset

SCRIPT = Path(__file__).parents[2] / "eval" / "fid_clip.py"


def test_a_folder_against_a_folder(stills, write_images, tmp_path, capsys):
    images, _ = stills(8)
    a, b = write_images(tmp_path / "a", images), write_images(tmp_path / "b", images[::-1] // 2)
    FidClip(a, reference=b, output=tmp_path / "out.json", device="cpu").run()
    found = json.loads((tmp_path / "out.json").read_text())["metrics"]
    value = found["fd_tiny"]["value"]
    assert value > 1
    out = capsys.readouterr().out
    for text in (f"fd_tiny  {value:.3f}", "n = 8 against 8", "dit-accel-tiny:64", "clean"):
        assert text in out
    assert "rank-deficient" in out


def test_bad_input_is_one_line_and_code_2(write_images, tmp_path):
    """Run the script in a separate process, as users do."""
    folder = write_images(tmp_path / "a", np.zeros((2, 64, 64, 3), np.uint8))
    call = [sys.executable, SCRIPT, str(folder)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: reference, clip")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    with pytest.raises(ValueError, match=r"source=.*prompts.txt.*--model"):
        FidClip(tmp_path / "prompts.txt", reference=folder).run()


@pytest.fixture
def args(write_images, tmp_path):
    """`args(*prompts, **changed)`: arguments to draw these with tiny-sd3 and compare them."""
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    reference = write_images(tmp_path / "reference", images)

    def build(*prompts, **changed):
        (tmp_path / "prompts.txt").write_text("".join(f"{x}\n" for x in prompts))
        given = {"source": tmp_path / "prompts.txt", "model": str(asset("tiny-sd3"))}
        given |= {"output_dir": tmp_path / "out", "reference": reference, "device": "cpu"}
        return FidClip(**given | changed)

    return build


def test_a_clip_is_drawn_and_its_frames_are_compared(args, wan_repository, tmp_path, capsys):
    size = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16}
    sampling = UncheckedSampling(num_inference_steps=1, **size)
    output = tmp_path / "deep" / "out.json"
    args("a red circle", model=str(wan_repository), sampling=sampling, output=output).run()
    assert json.loads(output.read_text())["metrics"]["fd_tiny"]["n"] == 5
    assert "(n = 5 frames against 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("prompts", "changed", "message"),
    [
        ("ab", {"reference": Path("none")}, "path='none'"),
        ("ab", {"prompts": Path("none.txt")}, "prompts='none.txt'"),
        ("ab", {"output": Path("/proc/none/out.json")}, "output='/proc/none'"),
        ("ab", {"inception": Path("none.pth")}, "none.pth"),
        ("a", {}, "'fd_tiny'.* 2 pictures.* has 1"),
    ],
    ids=["reference", "prompts", "output", "inception", "one prompt"],
)
def test_what_would_stop_the_metrics_stops_the_drawing(
    args, monkeypatch, prompts, changed, message
):
    monkeypatch.setattr(fid_clip, "generate", lambda *_, **__: pytest.fail("drawn"))
    with pytest.raises(ValueError, match=message):
        args(*prompts, **changed).run()


def test_under_torchrun_it_names_what_draws_there(args, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2.*eval generate"):
        args("a", "b").run()
