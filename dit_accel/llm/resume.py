"""`read_same`: reads the JSON file of an earlier run with the same settings, so that a run can resume."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_same(path: Path, header: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the content of a results file after checking that it belongs to the same run settings.

    Args:
        path: path of the file.
        header: kind and settings of the current run; all except the machine must equal those in the file.
        name: description of the file for error messages.

    Raises:
        ValueError: the file cannot be read, has another kind, or was made with other settings.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"output={str(path)!r}: cannot be read ({error})") from None
    if not isinstance(found, dict) or found.get("kind") != header["kind"]:
        raise ValueError(f"output={str(path)!r}: is not a {name}; must be a new file")
    for key, value in json.loads(json.dumps(header)).items():
        old = found.get(key)
        if key == "machine" or old == value:
            continue
        if isinstance(value, dict) and isinstance(old, dict):
            key = next(x for x in [*value, *old] if value.get(x) != old.get(x))
            old, value = old.get(key), value.get(key)
        raise ValueError(
            f"output={str(path)!r}: was made with {key}={_short(old)}, but this run has {_short(value)}; pass a new file "
            "or --overwrite"
        )
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
