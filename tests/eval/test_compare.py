"""An evaluation of one prompt: what is refused, and a folder that is never half a comparison."""

import errno
import os
from pathlib import Path

import pytest

from dit_accel.config import RASConfig, SLAConfig
from dit_accel.eval import compare, read_results
from dit_accel.eval.runs import timing
from dit_accel.runtime.install import installation_of

from .run_worker import SAMPLING

SLA = SLAConfig(topk=0.5, block_q=16, block_k=16, crossover="never", dense_steps=0)


def make(pipe, folder, prompt="a red circle", **changed):
    options = {"output_dir": folder, "model": "tiny", "sampling": SAMPLING, "sla": SLA}
    return compare(pipe, prompt, **options | changed)


def content(folder):
    return {x.name: x.read_bytes() for x in folder.iterdir()}


@pytest.fixture(scope="module")
def compared(wan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    make(wan, folder, methods=["fewer_steps:1"])
    return folder


@pytest.mark.parametrize("full_at", [2, 6])
def test_a_full_disk_names_the_file_and_keeps_the_earlier_comparison(
    wan, compared, monkeypatch, full_at
):
    """The first file that is written is a probe, the second a clip, the sixth results.json."""
    before, real, written = content(compared), os.fsync, []

    def fsync(handle):
        written.append(handle)
        if len(written) >= full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr("dit_accel.files.os.fsync", fsync)
    with pytest.raises(RuntimeError) as caught:
        make(wan, compared, overwrite=True, seed=5)
    named = Path(str(caught.value).split(": ")[0])
    assert named.parent == compared
    assert named.name in before
    assert "No space left" in str(caught.value)
    assert content(compared) == before
    assert installation_of(wan) is None


def test_a_comparison_that_is_replaced_leaves_no_old_file(wan, compared, tmp_path):
    for name, data in content(compared).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "mine.txt").write_text("mine")
    assert (tmp_path / "dense-1-step.mp4").is_file()
    result = make(wan, tmp_path, overwrite=True)
    files = {"dense.mp4", "sparse.mp4", "side_by_side.mp4", "contact_sheet.png", "results.json"}
    assert {x.name for x in tmp_path.iterdir()} == {*files, "mine.txt"}
    assert read_results(tmp_path) == result


BAD = {
    "sla": {"sla": None},
    "prompt": {"prompt": "  "},
    "repeats": {"repeats": 0},
    "fps": {"fps": float("nan")},
    "seed": {"seed": 2**63},
    "height": {"sampling": SAMPLING.overridden(height=33)},
    "methods": {"methods": ["slaa"]},
    "num_inference_steps": {"methods": ["fewer_steps:3"]},
    "kv_cache": {"ras": RASConfig(ratio=0.5, kv_cache="fp8")},
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("name", "changed"), BAD.items(), ids=BAD)
def test_bad_input_is_refused_before_any_work(wan, tmp_path, monkeypatch, name, changed):
    monkeypatch.setattr(timing, "run_batch", lambda *_, **__: pytest.fail("it worked"))
    with pytest.raises(ValueError, match=name):
        make(wan, tmp_path / "out", **changed)
    assert not (tmp_path / "out").exists()
    assert installation_of(wan) is None


def test_earlier_files_are_kept_before_any_work(wan, compared, monkeypatch):
    before = content(compared)
    monkeypatch.setattr(timing, "run_batch", lambda *_, **__: pytest.fail("it worked"))
    with pytest.raises(ValueError, match="output_dir"):
        make(wan, compared)
    assert content(compared) == before
