"""Supervisor of the measuring process: kills it when it hangs, and restarts it when it crashes."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit_accel.bench.gpu.device import first_line
from dit_accel.files import write_json

DEVICE_LOST = 75
STOPPED = 143
POLL_S = 0.5
GRACE_S = 20.0


def supervise(
    command: Callable[[bool], list[str]], path: Path, *, say: Callable[[str], None]
) -> int:
    """Run the measuring process to its end, and return its exit status.

    A process may die, lose its device, or stay in one sub-step much longer than estimated. This sub-step is then marked as
    crashed, and a new process continues after it.

    Args:
        command: function that returns the command line. Its argument is True if the process continues after a crash.
        path: JSON file that the process writes.
        say: function that prints a line.
    """
    stop, restarted = False, False
    child: subprocess.Popen | None = None

    def forward(number: int, frame: Any) -> None:
        nonlocal stop
        stop = True
        if child is not None:
            child.terminate()

    before = {x: signal.signal(x, forward) for x in (signal.SIGTERM, signal.SIGINT)}
    try:
        while True:
            started = time.time()
            child = subprocess.Popen(command(restarted))
            status = _watch(child, path, started, lambda: stop, say)
            if stop:
                return STOPPED
            if status >= 0 and status != DEVICE_LOST:
                return status
            crashed = _mark_crashed(path, started, status)
            if crashed is None and status != DEVICE_LOST:
                say(f"the process ended with status {status} before it began a sub-step")
                return 1
            say(f"the process ended with status {status}; a new process continues")
            restarted = True
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(
    child: subprocess.Popen,
    path: Path,
    started: float,
    stopped: Callable[[], bool],
    say: Callable[[str], None],
) -> int:
    """Wait for the process. Kill it if its sub-step greatly exceeds its limit, or if it ignores a signal."""
    asked = None
    while True:
        try:
            return child.wait(POLL_S)
        except subprocess.TimeoutExpired:
            pass
        running = _running(path, started)
        if running is not None and time.time() - running["since"] > running["limit_s"]:
            say(f"{running['id']}: over its limit of {running['limit_s']:.0f} s, ended")
            child.kill()
        if stopped():
            asked = asked or time.time()
            if time.time() - asked > GRACE_S:
                child.kill()


def _running(path: Path, started: float) -> dict[str, Any] | None:
    """Return the running sub-step of the process that started at `started`."""
    try:
        running = json.loads(path.read_text(encoding="utf-8")).get("running")
    except (OSError, ValueError):
        return None
    return running if running and running["since"] >= started else None


def _mark_crashed(path: Path, started: float, status: int) -> str | None:
    running = _running(path, started)
    if running is None:
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    data["running"] = None
    seconds = round(time.time() - running["since"], 1)
    error = f"the process ended with status {status}"
    data["steps"][running["id"]] = {"status": "crashed", "seconds": seconds, "error": error}
    try:
        write_json(path, data)
    except OSError as failure:
        raise RuntimeError(first_line(failure)) from failure
    return running["id"]
