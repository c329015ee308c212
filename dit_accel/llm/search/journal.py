"""`Journal`: measurements of a search in a file, so that a search that was stopped goes on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_accel.files import write_json

KIND = "llm-search-journal"


class Journal:
    """Values by name, written to a JSON file after each one.

    Args:
        path: the file; it is read if it exists. None: nothing is written.
        header: settings of the search; all but the machine must equal those of the file.
        overwrite: whether a file with other settings is replaced.

    Raises:
        ValueError: the file is no journal, or of other settings.
    """

    def __init__(
        self, path: Path | None, header: Mapping[str, Any], *, overwrite: bool = False
    ) -> None:
        self.path = path
        self.header = {"kind": KIND, **json.loads(json.dumps(header))}
        self.values: dict[str, Any] = {}
        if path is not None and path.exists() and not overwrite:
            self.values = self._read(path)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.values[name] = json.loads(json.dumps(value))
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {**self.header, "values": self.values})

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"output: {str(path)!r} cannot be read ({error})") from None
        if not isinstance(found, dict) or found.get("kind") != KIND:
            raise ValueError(
                f"output: {str(path)!r} is no journal of llm search; accepted is another name"
            )
        for key, value in self.header.items():
            old = found.get(key)
            if key == "machine" or old == value:
                continue
            if isinstance(value, dict) and isinstance(old, dict):
                key = next(x for x in [*value, *old] if value.get(x) != old.get(x))
                old, value = old.get(key), value.get(key)
            raise ValueError(
                f"output: {str(path)!r} was measured with {key}={_short(old)}, this run has {_short(value)}; accepted "
                "are another output or --overwrite"
            )
        values: dict[str, Any] = found["values"]
        return values


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
