"""Atomic writing and bundled assets."""

import json

import pytest

from dit_accel.files import asset, atomic_path, check_writable, write_json


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
