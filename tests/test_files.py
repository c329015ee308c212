"""Atomic writing and bundled assets."""

import json
from pathlib import Path

import pytest

from dit_accel.files import (
    EMBEDDED_MODELS,
    asset,
    atomic_path,
    check_writable,
    model_source,
    write_json,
)


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path):
    target = tmp_path / "result.json"
    write_json(target, {"old": 1})

    def interrupted_write():
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_write()
    assert json.loads(target.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_unwritable_folders_are_named(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(ValueError, match=r"output_dir='.*file/sub': cannot write there"):
        check_writable(blocker / "sub", "output_dir")
    assert check_writable(tmp_path / "a" / "b", "output_dir").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_full_disk_is_noticed_before_work_starts(tmp_path, monkeypatch):
    import errno
    import os

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dit_accel.files.os.fsync", full)
    with pytest.raises(ValueError, match="No space left on device"):
        check_writable(tmp_path, "output_dir")


def test_missing_assets_are_named():
    with pytest.raises(FileNotFoundError, match="no-such-asset"):
        asset("no-such-asset")


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_names_of_embedded_models_are_their_folders_unless_there_is_a_folder(
    name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for given in (name, Path(name)):
        assert model_source(given) == asset(name)
        assert (model_source(given) / "model_index.json").is_file()
    (tmp_path / name).write_text("a file is no model")
    assert model_source(name) == asset(name)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert model_source(name) == name


@pytest.mark.parametrize("name", ["org/tiny-wan", "tiny-wan2", "tiny-wan-judge.json", "./tiny-wan", "/x/tiny-sd3", ""])  # fmt: skip
def test_other_names_are_left_as_they_are(name):
    assert model_source(name) == name


def test_paths_stay_paths(tmp_path):
    assert model_source(tmp_path / "tiny-wan") == tmp_path / "tiny-wan"
