"""`RunLog`: write one JSON line per step and validation, and send the values to the trackers."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from dit_accel.files import atomic_path, naming_failures
from dit_accel.finetune.guards import jsonable

FILE_NAME = "log.jsonl"


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log. An incomplete last line, left by a killed process, is ignored.

    Raises:
        ValueError: if any other line is damaged.
    """
    return list(_records(path))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        yield record


class RunLog:
    """Log of a run. Only the main process writes the file.

    A resumed run removes the lines after its checkpoint, so that the log contains each step once.

    Args:
        folder: output folder of the run.
        is_main: True if this process writes.
        after: stage and step of the checkpoint from which the run resumes. None starts a new log.
        stages: names of the stages in order.

    Attributes:
        validated: stage and step of each validation in the log.
    """

    def __init__(
        self,
        folder: Path,
        *,
        is_main: bool = True,
        after: tuple[str, int] | None = None,
        stages: tuple[str, ...] = (),
    ) -> None:
        self.path = folder / FILE_NAME
        self._tracker: Callable[..., None] | None = None
        self._file: IO[str] | None = None
        records = [] if after is None else list(_records(self.path))
        kept = [x for x in records if after is not None and _is_before(x, after, stages)]
        self.validated = {
            (x["stage"], x["step"]) for x in kept if any(key.startswith("validation/") for key in x)
        }
        if not is_main:
            return
        with atomic_path(self.path, suffix=".part") as temporary, temporary.open("w") as file:
            file.writelines(json.dumps(x) + "\n" for x in kept)
        self._file = self.path.open("a", encoding="utf-8")

    def start_tracker(self, tracker: Callable[..., None] | None) -> None:
        """Send all following values to a tracker too.

        Args:
            tracker: function that takes a dict of values and `step`, such as `accelerator.log`. None for no tracker.
        """
        self._tracker = tracker

    def write(self, stage: str, step: int, values: dict[str, Any]) -> None:
        """Append a line to the log.

        Args:
            stage: "regression" or "distillation".
            step: number of finished steps of the stage.
            values: numbers by name. Names such as "a/b" form groups. Non-finite numbers are stored as strings.

        Raises:
            RuntimeError: if the line could not be written.
        """
        if self._file is not None:
            record = jsonable({"stage": stage, "step": step, **values})
            with naming_failures("the last checkpoint is unchanged"):
                self._file.write(json.dumps(record, allow_nan=False) + "\n")
                self._file.flush()
        if self._tracker is not None:
            numbers = {k: x for k, x in values.items() if isinstance(x, int | float)}
            self._tracker({f"{stage}/{key}": x for key, x in numbers.items()}, step=step)

    def sync(self) -> None:
        """Sync the log to the disk. Call it before writing a checkpoint.

        Raises:
            RuntimeError: if the log could not be written.
        """
        if self._file is not None:
            with naming_failures("the last checkpoint is unchanged"):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the log file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _is_before(record: dict[str, Any], after: tuple[str, int], stages: tuple[str, ...]) -> bool:
    stage, step = after
    order = {name: i for i, name in enumerate(stages)}
    own = order.get(record.get("stage", ""), 0)
    return own < order.get(stage, 0) or (own == order.get(stage, 0) and record["step"] <= step)
