"""`Journal`: file with the measurements of a search, from which an interrupted search resumes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_accel.files import write_json
from dit_accel.llm.resume import read_same

KIND = "llm-search-journal"


class Journal:
    """Mapping from names to values that is written to a JSON file after each assignment.

    Args:
        path: path of the file, which is read if it exists. None: nothing is written.
        header: settings of the search; all except the machine must equal those in the file.
        overwrite: replace a file with other settings.

    Raises:
        ValueError: the file is not a journal, or has other settings.
    """

    def __init__(
        self, path: Path | None, header: Mapping[str, Any], *, overwrite: bool = False
    ) -> None:
        self.path = path
        self.header = {"kind": KIND, **json.loads(json.dumps(header))}
        self.values: dict[str, Any] = {}
        if path is not None and path.exists() and not overwrite:
            self.values = read_same(path, self.header, "journal of llm search")["values"]

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.values[name] = json.loads(json.dumps(value))
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {**self.header, "values": self.values})
