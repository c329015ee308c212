"""Numbered files with sidecars: several processes, kills, full disks, invalid values."""

import errno
import json
import multiprocessing
import os
import signal

import numpy as np
import pytest

from dit_accel import control
from dit_accel.sampling import batches, media
from dit_accel.sampling.call import BatchResult
from dit_accel.sampling.image_files import read_image
from dit_accel.sampling.numbered import generate_numbered
from dit_accel.sampling.prompts import PromptRecord, number_prompts
from dit_accel.sampling.settings import Sampling

SAMPLING = Sampling(height=32, width=32, num_frames=5, num_inference_steps=2)
PROMPTS = number_prompts(["a red circle", "a blue square", "a white cross"])


def frames_of(seed):
    return np.random.default_rng(seed).random((5, 32, 32, 3))


@pytest.fixture
def drawn(monkeypatch):
    """Replace pipeline calls by random frames. Return the list of the seeds."""
    calls = []

    def draw(pipe, samples, **_):
        [sample] = samples
        calls.append(sample.seed)
        seconds = {"text": 0.25, "denoise": 1.0, "decode": 0.25, "total": 1.5}
        return BatchResult((sample,), frames_of(sample.seed)[None], seconds, control.summary(pipe))

    monkeypatch.setattr(batches, "run_batch", draw)
    return calls


def make(pipe, folder, prompts=PROMPTS, **changed):
    options = {"output_dir": folder, "model": "tiny", "sampling": SAMPLING, "kind": "png"}
    return generate_numbered(pipe, prompts, **options | changed)


def start(*arguments, die_at=0, **changed):
    """Start a process that calls `make` and kills itself before it renames file `die_at`."""

    def run():
        replace, count = os.replace, []

        def dying(*names):
            count.append(names)
            if len(count) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*names)

        os.replace = dying
        make(*arguments, **changed)

    # A forked process inherits the patched functions.
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def check_sidecars(folder):
    """Check that each sidecar is complete and lists the frames of its seed. Return the seeds."""
    seeds = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        assert [x.split("-")[0] for x in record["files"]] == [path.stem] * 5
        found = np.stack([read_image(folder / x) for x in record["files"]])
        np.testing.assert_array_equal(found, media.to_uint8(frames_of(record["seed"])))
        seeds.append(record["seed"])
    return seeds


def test_processes_that_write_into_one_folder_keep_everything(wan, drawn, tmp_path):
    processes = [start(wan, tmp_path, seed=100 * i) for i in range(4)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    seeds = check_sidecars(tmp_path)
    assert sorted(seeds) == sorted(100 * i + k for i in range(4) for k in range(3))
    assert len(list(tmp_path.iterdir())) == 12 * 6


@pytest.mark.parametrize("die_at", [1, 3, 6, 7, 12])
def test_a_kill_does_no_harm(wan, drawn, tmp_path, die_at):
    """A sample has five frames and a sidecar. The process is killed at a frame or at a sidecar."""
    process = start(wan, tmp_path, die_at=die_at)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    finished = check_sidecars(tmp_path)
    assert finished == list(range((die_at - 1) // 6))
    before = {x: x.read_bytes() for x in tmp_path.iterdir()}
    make(wan, tmp_path, seed=50)
    assert check_sidecars(tmp_path) == [*finished, 50, 51, 52]
    assert all(x.read_bytes() == data for x, data in before.items())


def test_a_full_disk_names_the_file_and_leaves_what_is_finished(wan, drawn, tmp_path, monkeypatch):
    real, written = media.write_png, []

    def full(path, image):
        written.append(path)
        if len(written) == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, image)

    monkeypatch.setattr(media, "write_png", full)
    with pytest.raises(RuntimeError) as caught:
        make(wan, tmp_path)
    assert str(tmp_path / "0001-002.png") in str(caught.value)
    assert "No space left" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert check_sidecars(tmp_path) == [0]
    assert len(list(tmp_path.iterdir())) == 6


BAD = [
    *({"fps": x} for x in (float("nan"), float("inf"), -float("inf"), 0, -1, 1e-9, 1e9, "16", True)),
    *({"seed": x} for x in (-1, 2**63, 2**63 - 2, 10**30, 1.5, True, None, "1")),
    {"kind": "avi"},
    {"save_focus": True},
    {"prompts": []},
    {"prompts": [PromptRecord("a", "x", height=33)]},
    {"sampling": SAMPLING.overridden(width=33)},
]  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("changed", BAD, ids=str)
def test_bad_values_are_refused_before_any_work(wan, drawn, tmp_path, changed):
    [name] = changed
    named = {"prompts": "prompts|height", "sampling": "width"}.get(name, name)
    with pytest.raises(ValueError, match=rf"\b({named})\b"):
        make(wan, **{"folder": tmp_path / "out"} | changed)
    assert drawn == []
    assert not (tmp_path / "out").exists()


def test_the_largest_seed_is_fine(wan, drawn, tmp_path):
    make(wan, tmp_path, seed=2**63 - 3)
    assert drawn == [2**63 - 3, 2**63 - 2, 2**63 - 1]
    own = [PromptRecord("a", "x", seed=2**63 - 1)]
    [record] = make(wan, tmp_path, own)
    assert record["seed"] == json.loads((tmp_path / "0003.json").read_text())["seed"] == 2**63 - 1


def test_values_that_are_not_finite_leave_no_file(wan, drawn, tmp_path, monkeypatch):
    def broken(pipe, samples, **_):
        frames = np.full((1, 5, 32, 32, 3), np.nan)
        return BatchResult(tuple(samples), frames, {"total": 1.0}, control.summary(pipe))

    monkeypatch.setattr(batches, "run_batch", broken)
    with pytest.raises(RuntimeError, match="not finite"):
        make(wan, tmp_path)
    assert list(tmp_path.iterdir()) == []
