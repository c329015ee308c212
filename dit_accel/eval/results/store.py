"""Building, checking, reading and writing results.json."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    NotRequired,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from dit_accel.environment import machine, versions
from dit_accel.eval.results.types import (
    FORMAT_VERSION,
    PHASES,
    PLAIN,
    RESULTS,
    SPEEDUPS,
    Results,
    identical,
    one_of,
)
from dit_accel.files import write_json


def build_results(*, reference: str = "dense", **content: Any) -> Results:
    """Return the checked content of results.json; versions and machine are added.

    Args:
        reference: name or method of the row that the others are compared with.
        content: the other fields of `types.Results`.

    Raises:
        ValueError: see `validate`.
    """
    head = {"format_version": FORMAT_VERSION, "kind": "eval", "reference": reference}
    return validate({**head, **content, "versions": versions(), "machine": machine()})


def write_results(folder: str | os.PathLike, results: Results) -> Path:
    """Check the results, write `folder`/results.json atomically, and return its path."""
    path = Path(folder) / RESULTS
    write_json(path, cast(dict[str, Any], validate(results)))
    return path


def read_results(path: str | os.PathLike) -> Results:
    """Read and check a results.json.

    Args:
        path: the file, or its folder.

    Raises:
        ValueError: the file is missing, is not JSON, has another version, or has a value that
            `validate` refuses.
    """
    path = Path(path)
    file = path / RESULTS if path.is_dir() else path
    try:
        return validate(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(
            f"path={str(path)!r}: cannot read {file.name} ({error.strerror or error}); accepted is "
            "a results.json or its folder"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"path={str(path)!r}: {file.name} is not JSON ({error})") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def validate(data: Any) -> Results:
    """Check the content of a results.json. Keys that the types do not name are let through.

    Returns:
        `data` itself.

    Raises:
        ValueError: a value is missing or not valid; the message names the place, as in
            `rows[2].metrics.psnr.n=-1`.
    """
    _require(isinstance(data, dict), "results", data, "an object")
    version = data.get("format_version")
    known = f"{FORMAT_VERSION}; another version of dit-accel wrote this file"
    _require(version == FORMAT_VERSION, "format_version", version, known)
    _require(data.get("kind") == "eval", "kind", data.get("kind"), '"eval"')
    _check("", data, Results)
    rows, samples, reference = data["rows"], data["samples"], data["reference"]
    _require(len(rows) > 0, "rows", rows, "at least one row")
    names = _unique("rows", rows, "name")
    quoted = ", ".join(map(repr, names))
    found = reference in names or any(row["method"] == reference for row in rows)
    expected = f"the name or the method of a row; the names are {quoted}"
    _require(found, "reference", reference, expected)
    for i, row in enumerate(rows):
        _check_row(f"rows[{i}]", row)
    for i, sample in enumerate(samples):
        for name in sample["media"]:
            _require(name in names, f"samples[{i}].media: row", name, f"one of {quoted}")
    _unique("samples", samples, "id")
    return cast(Results, data)


def _check_row(place: str, row: dict[str, Any]) -> None:
    """Check what depends on more than one field of a row."""
    if not row["available"]:
        _require(row["why"] is not None, f"{place}.why", None, "a text that is not empty")
    for phase in row["seconds"]:
        _require(phase in PHASES, f"{place}.seconds: phase", phase, one_of(PHASES).accepted)
    if row["speedup"] is not None:
        for key in SPEEDUPS:
            _present(f"{place}.speedup", row["speedup"], key)
    if row["peak_memory_bytes"] is not None:
        measured, of = ("gpu", "process"), row["peak_memory_of"]
        _require(of in measured, f"{place}.peak_memory_of", of, one_of(measured).accepted)
    for name, metric in row["metrics"].items():
        if metric["value"] is None and not identical(metric):
            _present(f"{place}.metrics.{name}", metric, "why")


def _check(place: str, value: Any, kind: Any, null: str = "") -> None:
    """Check a value against a type: a TypedDict, or what its fields are made of.

    Args:
        null: addition to the message where null is valid too.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    for rule in arguments[1:] if origin is Annotated else PLAIN.get(kind, ()):
        try:
            ok = rule.holds(value)
        except (TypeError, AttributeError):  # a value of another type
            ok = False
        _require(ok, place, value, rule.accepted + null)
    if origin in (Union, UnionType):  # X | None
        if value is not None:
            _check(place, value, arguments[0], " or null")
    elif origin in (Annotated, NotRequired):
        _check(place, value, arguments[0], null)
    elif is_typeddict(kind):
        _require(isinstance(value, dict), place, value, "an object" + null)
        for key, field in get_type_hints(kind, include_extras=True).items():
            if key in kind.__required_keys__:
                _present(place, value, key)
            if key in value:
                _check(f"{place}.{key}".lstrip("."), value[key], field)
    elif origin is list:
        items = "texts" if arguments[0] is str else "objects"
        _require(isinstance(value, list), place, value, f"a list of {items}" + null)
        for i, item in enumerate(value):
            _check(f"{place}[{i}]", item, arguments[0])
    elif origin is dict:
        _require(isinstance(value, dict), place, value, "an object" + null)
        for key, item in value.items():
            _check(f"{place}.{key}", item, arguments[1])


def _present(place: str, value: dict[str, Any], key: str) -> None:
    if key not in value:
        raise ValueError(f"{f'{place}.{key}'.lstrip('.')} is missing")


def _require(ok: bool, place: str, value: Any, accepted: str) -> None:
    if not ok:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise ValueError(f"{place}={shown}: accepted is {accepted}")


def _unique(place: str, entries: Sequence[dict[str, Any]], key: str) -> list[str]:
    """Return the values of `key`, each of which may be used once."""
    seen: list[str] = []
    for i, entry in enumerate(entries):
        _require(entry[key] not in seen, f"{place}[{i}].{key}", entry[key], "a name used once")
        seen.append(entry[key])
    return seen
