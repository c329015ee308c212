"""results.json of an evaluation: building, reading, writing.

Everything that shows or judges an evaluation reads this file, so it is checked whole on the way in
and out (schema.py).
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from dit_accel.environment import machine, versions
from dit_accel.eval.results.schema import validate
from dit_accel.eval.results.types import FORMAT_VERSION, RESULTS, Results, Row, Sample
from dit_accel.files import write_json


def build_results(
    *,
    title: str,
    model: str,
    sampling: Mapping[str, Any],
    prompts: int,
    repeats: int,
    rows: Sequence[Row],
    samples: Sequence[Sample],
    reference: str = "dense",
    fine: Mapping[str, Any] | None = None,
) -> Results:
    """The checked content of results.json; versions and machine are added.

    Raises:
        ValueError: as `schema.validate`.
    """
    return validate(
        {
            "format_version": FORMAT_VERSION,
            "kind": "eval",
            "title": title,
            "model": model,
            "sampling": dict(sampling),
            "prompts": prompts,
            "reference": reference,
            "fine": fine,
            "versions": versions(),
            "machine": machine(),
            "repeats": repeats,
            "rows": list(rows),
            "samples": list(samples),
        }
    )


def write_results(folder: str | os.PathLike, results: Results) -> Path:
    """Check, then write `folder`/results.json, atomically; returns its path."""

    validate(cast(dict[str, Any], results))
    path = Path(folder) / RESULTS
    write_json(path, cast(dict[str, Any], results))
    return path


def read_results(path: str | os.PathLike) -> Results:
    """Read and check a results.json.

    Args:
        path: the file, or the folder it lies in.

    Raises:
        ValueError: not there, not JSON, another version, or anything `schema.validate` finds.
    """

    path = Path(path)
    file = path / RESULTS if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"path={str(path)!r}: cannot read {file.name} ({error.strerror or error}); accepted is "
            "a results.json or the folder of one"
        ) from None
    except ValueError as error:  # also UnicodeDecodeError
        raise ValueError(f"path={str(path)!r}: {file.name} is not JSON ({error})") from None
    try:
        return validate(data)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
