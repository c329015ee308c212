"""Output files of `dit-accel llm generate`: the text and a JSON record with the same name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_accel.environment import machine, versions
from dit_accel.files import atomic_path, write_json
from dit_accel.llm.generate import Generation

FORMAT_VERSION = 1


def check_name(path: Path) -> None:
    """Check the path of the text file. The record gets the same path with the suffix .json.

    Raises:
        ValueError: the path is a folder or ends with .json.
    """
    if path.suffix == ".json":
        raise ValueError(
            f"output={str(path)!r}: must not end with .json, because the record beside it does"
        )
    if path.is_dir():
        raise ValueError(f"output={str(path)!r}: is a folder; must be the name of a file")


def write_generation(path: Path, done: Generation, settings: Mapping[str, Any]) -> None:
    """Write the generated text to `path`, and a record to the same path with the suffix .json.

    Args:
        path: text file, see `check_name`; its folder is created if needed.
        done: the generation.
        settings: model and arguments for the record.
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
