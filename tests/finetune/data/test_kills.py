"""A precomputed folder survives a kill, and a full disk, at any write."""

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dit_accel.finetune.data.store import open_store
from dit_accel.finetune.data.writer import store_writer

from .test_store import check, write


class Killed(BaseException):
    """Ends a run as SIGKILL does: nothing that the program does afterwards reaches the disk."""


OPERATIONS = ("fsync", "replace", "unlink")


@pytest.fixture
def killed_at(monkeypatch):
    """`killed_at(number, run)`: run until the given system call, then let nothing through; True if it came so far."""

    def run_until(number, run, *, after):
        calls = 0
        real = {name: getattr(os, name) for name in (*OPERATIONS, "open", "mkdir")}
        real_open, real_write = Path.open, Path.write_bytes

        def guarded(name):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls > number:
                    raise Killed
                if calls == number and not after:
                    raise Killed
                result = real[name](*args, **kwargs)
                if calls == number:
                    raise Killed
                return result

            return call

        def dead(function):
            def call(*args, **kwargs):
                if calls >= number:
                    raise Killed
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in OPERATIONS:
                patch.setattr(os, name, guarded(name))
            patch.setattr(Path, "open", dead(real_open))
            patch.setattr(Path, "write_bytes", dead(real_write))
            patch.setattr(Path, "unlink", dead(Path.unlink))
            with contextlib.suppress(Killed):
                run()
                return False
        return True

    return run_until


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("start", ["new", "growing"])
def test_a_killed_run_goes_on(quick, killed_at, start, after):
    number = 0
    made_again = []
    while True:
        number += 1
        folder = quick / f"{number}"
        if start == "growing":
            write(folder, 4)
        if not killed_at(number, lambda folder=folder: write(folder), after=after):
            break
        if start == "growing":
            check(folder, 4) if not (folder / "manifest.json").read_text().count(
                "v/6.mp4"
            ) else check(folder)
        elif (folder / "manifest.json").exists():
            check(folder)
        else:
            with pytest.raises(ValueError, match=r"incomplete|no manifest.json"):
                open_store(folder)
        made_again.append(write(folder))
        check(folder)
        assert not [x for x in folder.iterdir() if x.name.startswith(".tmp-")]
        assert not (folder / "manifest.partial.jsonl").exists()
    assert number > 8
    # Not everything is made again: what was complete is kept.
    assert made_again == sorted(made_again, reverse=True)
    assert made_again[-1] == 0


@pytest.mark.parametrize("operation", ["fsync", "replace", "write_bytes"])
def test_a_full_disk_loses_nothing(quick, monkeypatch, operation):
    number = 0
    while True:
        number += 1
        folder = quick / f"{number}"
        calls = 0
        owner = Path if operation == "write_bytes" else os
        real = getattr(owner, operation)

        def full(*args, real=real, number=number, **kwargs):
            nonlocal calls
            calls += 1
            if calls >= number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, operation, full)
            failure = None
            try:
                write(folder)
            except RuntimeError as error:
                failure = str(error)
        if failure is None:
            break
        assert "No space left on device" in failure
        write(folder)
        check(folder)
    assert number >= 3


def test_a_torn_line_of_the_journal_does_not_count(tmp_path):
    folder = tmp_path / "store"
    journal = folder / "manifest.partial.jsonl"
    for length in (1, 40, 200):
        with contextlib.suppress(RuntimeError):
            write(folder, make=False)  # leaves nothing but the lock
        _half(folder)
        text = journal.read_text()
        journal.write_text(text[:-length])
        assert write(folder) in (4, 7)
        check(folder)
        for path in folder.glob("*"):
            path.unlink()


def _half(folder):
    """Write two shards and leave the journal, as a killed run does."""

    class Stop(Exception):
        pass

    from dit_accel.finetune.data import writer

    real = writer.StoreWriter.finish
    try:
        writer.StoreWriter.finish = lambda *_: (_ for _ in ()).throw(Stop)
        with contextlib.suppress(Stop):
            write(folder, 6)
    finally:
        writer.StoreWriter.finish = real
    # The other samples are missing; the folder is asked for 7.


def test_sigkill(tmp_path):
    """A process that is really killed leaves a free lock and its complete shards."""
    folder = tmp_path / "store"
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from tests.finetune.data.test_kills import fill
from dit_accel.finetune.data import writer
append = writer._append
def append_and_die(path, line):
    append(path, line)
    if "shard-00001" in line:
        os.kill(os.getpid(), signal.SIGKILL)
writer._append = append_and_die
fill({str(folder)!r})
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert fill(folder) == 4
    store = open_store(folder)
    assert [float(store.sample(i)[0].sum()) for i in range(6)] == [0, 1, 2, 3, 4, 5]


def fill(folder):
    """Write six samples that are not there yet; return how many were."""
    sources = {str(i): {} for i in range(6)}
    arguments = {"settings": {}, "model": {"parts": {}}, "sources": sources, "shard_samples": 2}
    with store_writer(folder, **arguments) as store:
        found = len(store.done)
        for i in range(6):
            if str(i) not in store.done:
                store.add(str(i), "1x8x8", (torch.full((1, 1, 1), float(i)), {}), {})
        store.finish(list(sources))
    return found
