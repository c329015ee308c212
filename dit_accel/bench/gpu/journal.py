"""`Journal`: state of a run in a JSON file, written after every sub-step and read to resume."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.bench.gpu.device import Device, Result
from dit_accel.files import write_json

FORMAT_VERSION = 1
# Facts that must be equal when a run is resumed.
SAME = ("device", "capability", "source")


@dataclass(frozen=True)
class SubStep:
    """Measurement, and an estimate of its time."""

    step: str
    name: str
    run: Callable[[Device, dict[str, Result]], Result]
    """Function of the device and the results of finished sub-steps by id. Returns plain data."""
    seconds: float = 2.0
    """Time in seconds that does not depend on the speed of the device: loading kernels, allocating, planning."""
    flops: float = 0.0
    """FLOPs of matrix products. Their time is estimated from the measured peak."""

    @property
    def id(self) -> str:
        return f"{self.step}/{self.name}"


class ResumeError(ValueError):
    """The run in the file cannot be resumed here."""


class Journal:
    """State of a run, in memory and in a file.

    Args:
        path: JSON file.
        facts: device, source and versions of this run.
        resume: resume the run in the file. Default: start a new run.

    Raises:
        ResumeError: the file has no run, or one with another device or other source.
    """

    def __init__(self, path: Path, facts: dict[str, Any], *, resume: bool = False) -> None:
        self.path = path
        self.data: dict[str, Any] = {"format_version": FORMAT_VERSION, **facts, "running": None}
        self.data["steps"] = {}
        if resume:
            old = read(path)
            if old.get("format_version") != FORMAT_VERSION:
                raise ResumeError(
                    f"--resume: {path} has format_version {old.get('format_version')}; "
                    f"accepted is {FORMAT_VERSION}"
                )
            for name in SAME:
                if old.get(name) != facts[name]:
                    raise ResumeError(
                        f"--resume: {path} has {name}={old.get(name)!r}, but this run has {facts[name]!r}; accepted is "
                        "the same device and source. Without --resume a new run starts"
                    )
            # Sub-steps that were skipped for lack of time run now.
            self.data["steps"] = {
                name: entry for name, entry in old["steps"].items() if entry["status"] != "skipped"
            }
        self.save()

    def save(self) -> None:
        write_json(self.path, self.data)

    def results(self) -> dict[str, Result]:
        """Return the results of the finished sub-steps by id."""
        return {
            name: entry["result"]
            for name, entry in self.data["steps"].items()
            if entry["status"] == "done"
        }

    def begin(self, sub_step: SubStep, limit_s: float) -> None:
        """Record the running sub-step, so that the supervisor can detect a hang."""
        self.data["running"] = {"id": sub_step.id, "since": time.time(), "limit_s": limit_s}
        self.save()

    def end(self, sub_step_id: str, status: str, **entry: Any) -> None:
        """Record the result of a sub-step and its status: "done", "failed", "crashed" or "skipped"."""
        self.data["running"] = None
        self.data["steps"][sub_step_id] = {"status": status, **plain(entry)}
        self.save()

    def pause(self) -> None:
        """Remove the record of the running sub-step, so that a resumed run repeats it."""
        self.data["running"] = None
        self.save()


def plain(x: Any) -> Any:
    """Return data in types that JSON supports. Numbers that are not finite become strings."""
    if isinstance(x, dict):
        return {str(name): plain(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [plain(value) for value in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def read(path: Path) -> dict[str, Any]:
    """Return the data of a file.

    Raises:
        ResumeError: the file does not exist, or has no run.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ResumeError(
            f"--resume: {path} does not exist. Without --resume a new run starts"
        ) from error
    except ValueError as error:
        raise ResumeError(f"--resume: {path} is not a JSON file ({error})") from error
    if not isinstance(data, dict) or not _has_entries(data.get("steps")):
        raise ResumeError(f"--resume: {path} has no run of this script")
    return data


def _has_entries(steps: Any) -> bool:
    return isinstance(steps, dict) and all(
        isinstance(x, dict) and "status" in x and ("result" in x or x["status"] != "done")
        for x in steps.values()
    )
