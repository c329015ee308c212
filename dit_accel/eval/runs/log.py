"""timings.json: measured calls, kept so that an evaluation that was killed goes on."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_accel.files import write_json
from dit_accel.sampling.manifest import differences

TIMINGS = "timings.json"
FORMAT_VERSION = 1


class TimingLog:
    """Calls by method, valid for one machine and one choice of settings.

    Seconds of another machine, or of methods that did not take turns, cannot be compared; those are
    measured anew.
    """

    calls: dict[str, list[dict[str, Any]]]

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        """`about`: everything that the seconds depend on, for JSON."""
        self._path = folder / TIMINGS
        self._about = json.loads(json.dumps({"format_version": FORMAT_VERSION, **about}))
        self.calls = {}
        if not self._path.is_file():
            return
        try:
            saved = json.loads(self._path.read_text(encoding="utf-8"))
            different = differences(saved["about"], self._about)
            if not different:
                self.calls = {name: list(calls) for name, calls in saved["calls"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            different = [f"{TIMINGS} is damaged ({error!r})"]
        if different:
            sys.stderr.write(f"note: seconds are measured anew: {'; '.join(different[:3])}\n")

    def write(self) -> None:
        """Atomically."""
        write_json(self._path, {"about": self._about, "calls": self.calls})
