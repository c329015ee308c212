"""Atomic writing and bundled assets."""

import errno
import json
import os
from pathlib import Path

import pytest

from dit_accel.files import (
    EMBEDDED_MODELS,
    asset,
    atomic_directory,
    atomic_files,
    atomic_path,
    check_file,
    check_writable,
    model_source,
    naming_failures,
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


def test_files_that_cannot_be_written_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"^--output='.*': is a folder"):
        check_file(tmp_path, "--output")
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(ValueError, match=r"^--output='.*': cannot write there"):
        check_file(blocker / "sub" / "table.md", "--output")
    check_file(tmp_path / "new" / "table.md", "--output")
    assert (tmp_path / "new").is_dir()


def test_unwritable_folders_are_named(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(ValueError, match=r"output_dir='.*file/sub': cannot write there"):
        check_writable(blocker / "sub", "output_dir")
    assert check_writable(tmp_path / "a" / "b", "output_dir").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_full_disk_is_noticed_before_work_starts(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dit_accel.files.os.fsync", full)
    with pytest.raises(ValueError, match="No space left on device"):
        check_writable(tmp_path, "output_dir")


def test_missing_assets_are_named():
    with pytest.raises(FileNotFoundError, match="no-such-asset"):
        asset("no-such-asset")


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_one(folder):
    write_json(folder / "b.json", {})


def write_in_a_new_folder(folder):
    with atomic_directory(folder / "new") as temporary:
        write_json(temporary / "b.json", {})


def write_several(folder):
    with atomic_files(folder) as temporary:
        (temporary / "a.txt").write_text("new")
        write_json(temporary / "b.json", {})


@pytest.mark.parametrize(
    ("act", "name"),
    [(write_one, "b.json"), (write_in_a_new_folder, "new/b.json"), (write_several, "b.json")],
)
def test_a_full_disk_names_the_file_that_was_asked_for(tmp_path, monkeypatch, act, name):
    (tmp_path / "a.txt").write_text("old")
    monkeypatch.setattr("dit_accel.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        act(tmp_path)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / name))
    assert [x.name for x in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"
    with pytest.raises(RuntimeError) as told, naming_failures("advice"):
        act(tmp_path)
    assert str(tmp_path / name) in str(told.value)
    assert "No space left" in str(told.value)
    assert "\n" not in str(told.value)


def test_other_files_are_not_blamed(tmp_path):
    missing = tmp_path / "elsewhere" / "input.txt"
    for kind in (atomic_path, atomic_directory):
        with pytest.raises(FileNotFoundError) as caught, kind(tmp_path / "out"):
            missing.read_text()
        assert caught.value.filename == str(missing)
    with pytest.raises(FileNotFoundError) as caught, atomic_files(tmp_path):
        missing.read_text()
    assert caught.value.filename == str(missing)
    assert list(tmp_path.iterdir()) == []


def test_files_move_together(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "kept.txt").write_text("kept")
    write_several(tmp_path)
    assert {x.name: x.read_text() for x in tmp_path.iterdir()} == {
        "a.txt": "new",
        "b.json": "{}\n",
        "kept.txt": "kept",
    }


def test_embedded_models_have_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in EMBEDDED_MODELS:
        assert model_source(name) == asset(name)
        assert (asset(name) / "model_index.json").is_file()
    for other in ("org/tiny-wan", "./tiny-wan", Path("/models/tiny-wan"), "", "tiny"):
        assert model_source(other) == other
    (tmp_path / "tiny-wan").mkdir()  # results of an evaluation, say
    assert model_source("tiny-wan") == asset("tiny-wan")
    (tmp_path / "tiny-wan" / "model_index.json").write_text("{}")
    assert model_source("tiny-wan") == "tiny-wan"


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
    (tmp_path / name / "model_index.json").write_text("{}")
    assert model_source(name) == name


@pytest.mark.parametrize("name", ["org/tiny-wan", "tiny-wan2", "tiny-wan-judge.json", "./tiny-wan", "/x/tiny-sd3", ""])  # fmt: skip
def test_other_names_are_left_as_they_are(name):
    assert model_source(name) == name


def test_paths_stay_paths(tmp_path):
    assert model_source(tmp_path / "tiny-wan") == tmp_path / "tiny-wan"
