"""Files in which an evaluation keeps what it has measured, so that a run that was killed goes on."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_accel.files import write_json
from dit_accel.sampling.manifest import differences

FORMAT_VERSION = 1


class Log:
    """Results by method, valid for one choice of settings; those of other settings are dropped with a note.

    Args:
        path: the file.
        about: everything that the results depend on, for JSON.
        kind: key of the results in the file.
        dropped: what the note says of results that are dropped.
    """

    results: dict[str, Any]

    def __init__(self, path: Path, about: Mapping[str, Any], *, kind: str, dropped: str) -> None:
        self._path, self._kind = path, kind
        self._about = json.loads(json.dumps({"format_version": FORMAT_VERSION, **about}))
        self.results = {}
        if not path.is_file():
            return
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            different = differences(saved["about"], self._about)
            if not different:
                self.results = dict(saved[kind].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            different = [f"{path.name} is damaged ({error!r})"]
        if different:
            sys.stderr.write(f"note: {dropped}: {'; '.join(different[:3])}\n")

    def write(self) -> None:
        """Write the file, atomically."""
        write_json(self._path, {"about": self._about, self._kind: self.results})


def timing_log(folder: Path, about: Mapping[str, Any]) -> Log:
    """Return the log of measured calls. Seconds of another machine, or of methods that did not take turns, cannot be
    compared."""
    path = folder / "timings.json"
    return Log(path, about, kind="calls", dropped="seconds are measured anew")
