"""`RunLog`: the log of a run: a JSON line for each step and validation, and the trackers."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from dit_accel.files import atomic_path, naming_failures
from dit_accel.finetune.guards import jsonable

FILE_NAME = "log.jsonl"


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log; a last line that a killed process left unfinished is left out.

    Raises:
        ValueError: another line is damaged.
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
    """Log of a run; only the main process writes.

    Lines that a killed run wrote after its last checkpoint are removed when it goes on, so that each
    step is there once.

    Args:
        folder: output folder of the run.
        is_main: whether this process writes.
        after: (stage, step) of the checkpoint that the run goes on from; None: a new run.
        stages: names of the stages in their order.

    Attributes:
        validated: (stage, step) of the validations that the log holds.
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
        """Also send lines to a tracker from now on.

        Args:
            tracker: takes values and `step`, as `accelerator.log` does; None: there is none.
        """
        self._tracker = tracker

    def write(self, stage: str, step: int, values: dict[str, Any]) -> None:
        """Add a line.

        Args:
            stage: "regression" or "distillation".
            step: finished steps of this stage.
            values: numbers by name; "a/b" groups them. Values that are not finite are kept as their names.

        Raises:
            RuntimeError: the line could not be written.
        """
        if self._file is not None:
            record = jsonable({"stage": stage, "step": step, **values})
            with naming_failures("the last checkpoint is unharmed"):
                self._file.write(json.dumps(record, allow_nan=False) + "\n")
                self._file.flush()
        if self._tracker is not None:
            numbers = {k: x for k, x in values.items() if isinstance(x, int | float)}
            self._tracker({f"{stage}/{key}": x for key, x in numbers.items()}, step=step)

    def sync(self) -> None:
        """Bring the lines to the disk, before a checkpoint counts on them.

        Raises:
            RuntimeError: they could not be written.
        """
        if self._file is not None:
            with naming_failures("the last checkpoint is unharmed"):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _is_before(record: dict[str, Any], after: tuple[str, int], stages: tuple[str, ...]) -> bool:
    stage, step = after
    order = {name: i for i, name in enumerate(stages)}
    own = order.get(record.get("stage", ""), 0)
    return own < order.get(stage, 0) or (own == order.get(stage, 0) and record["step"] <= step)
