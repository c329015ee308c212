"""Files of `dit-accel llm generate`: the text, and a JSON record beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_accel.environment import machine, versions
from dit_accel.files import atomic_path, write_json
from dit_accel.llm.generate import Generation

FORMAT_VERSION = 1


def check_name(path: Path) -> None:
    """Check that a text can have this name, and its record the same with the suffix .json.

    Raises:
        ValueError: it cannot.
    """
    if path.suffix == ".json":
        raise ValueError(
            f"output={str(path)!r}: the record has this name; accepted is the name of a text file"
        )
    if path.is_dir():
        raise ValueError(f"output={str(path)!r}: is a folder; accepted is the name of a file")


def write_generation(path: Path, done: Generation, settings: Mapping[str, Any]) -> None:
    """Write the text to `path` and the record to the same name with the suffix .json.

    Args:
        path: see `check_name`; its folder is created if needed.
        done: what was generated.
        settings: model and arguments, for the record.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(done.text + "\n", encoding="utf-8")
    record = {
        "format_version": FORMAT_VERSION,
        "kind": "llm-generate",
        **settings,
        **done.to_dict(),
        "versions": versions(),
        "machine": machine(),
    }
    write_json(path.with_suffix(".json"), record)
