"""The lock of an output folder."""

import os
import signal
import subprocess
import sys

import pytest

from dit_accel.finetune.lock import RunLock


def test_second_run_is_refused_by_name(tmp_path):
    holder = rf"output_dir=.*process {os.getpid()}"
    with RunLock(tmp_path), pytest.raises(ValueError, match=holder):
        RunLock(tmp_path)
    with RunLock(tmp_path):
        pass


def test_other_folders_are_free(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with RunLock(tmp_path / "a"), RunLock(tmp_path / "b"):
        pass


HOLDER = """
import os, sys, time
from pathlib import Path
from dit_accel.finetune.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
if os.fork() == 0:
    print(os.getpid(), flush=True)
    os.close(1)
    time.sleep(60)
    os._exit(0)
time.sleep(60)
"""


def test_lock_dies_with_its_process_even_if_a_child_lives_on(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(ValueError, match=f"process {holder.pid} "):
            RunLock(tmp_path)
        holder.kill()
        holder.wait()
        with RunLock(tmp_path):
            os.kill(child, 0)  # which is still there
    finally:
        os.kill(child, signal.SIGKILL)
