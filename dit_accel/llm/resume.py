"""`read_same`: a JSON file that a run goes on from, if it was made with the same settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_same(path: Path, header: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what a file holds.

    Args:
        path: the file.
        header: its kind and settings as the run has them; all but the machine must be equal.
        name: name of such files, for messages.

    Raises:
        ValueError: the file is no such file, or was made with other settings.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"output={str(path)!r}: cannot be read ({error})") from None
    if not isinstance(found, dict) or found.get("kind") != header["kind"]:
        raise ValueError(f"output={str(path)!r}: is no {name}; accepted is a new file")
    for key, value in json.loads(json.dumps(header)).items():
        old = found.get(key)
        if key == "machine" or old == value:
            continue
        if isinstance(value, dict) and isinstance(old, dict):
            key = next(x for x in [*value, *old] if value.get(x) != old.get(x))
            old, value = old.get(key), value.get(key)
        raise ValueError(
            f"output={str(path)!r}: made with {key}={_short(old)}, this run has {_short(value)}; accepted are a new file "
            "or --overwrite"
        )
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
