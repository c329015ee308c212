"""Building, checking, reading and writing results.json."""

import json
import os
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_accel.environment import machine, versions
from dit_accel.eval.results import types
from dit_accel.eval.results.types import RESULTS, SPEEDUPS, Results
from dit_accel.files import write_json


def build_results(*, reference: str = "dense", **content: Any) -> Results:
    """Return the checked content of results.json; versions and machine are added.

    Args:
        reference: name or method of the row that the others are compared with.
        content: the other fields of `types.Results`.

    Raises:
        ValueError: see `validate`.
    """
    head = {"format_version": types.FORMAT_VERSION, "kind": "eval", "reference": reference}
    return validate({**head, **content, "versions": versions(), "machine": machine()})


def write_results(folder: str | os.PathLike, results: Results) -> Path:
    """Check the results, write `folder`/results.json atomically, and return its path."""
    path = Path(folder) / RESULTS
    write_json(path, typing.cast(dict[str, Any], validate(results)))
    return path


def read_results(path: str | os.PathLike) -> Results:
    """Read and check a results.json, given as the file or its folder.

    Raises:
        ValueError: the file is missing, is not JSON, has another version, or has a bad value.
    """
    path = Path(path)
    file = path / RESULTS if path.is_dir() else path
    try:
        return validate(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        why = f"cannot read {file.name} ({error.strerror or error})"
        raise ValueError(f"path={str(path)!r}: {why}: must be a results.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"path={str(path)!r}: {file.name} is not JSON ({error})") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def validate(data: Any) -> Results:
    """Check the content of a results.json and return it. Keys that the types do not name are let through.

    Raises:
        ValueError: naming the place, the value and valid values, as in `rows[2].metrics.psnr.n=-1`.
    """
    _require(isinstance(data, dict), "results", data, "an object")
    known = f"{types.FORMAT_VERSION}; another version of dit-accel wrote this file"
    version, kind = data.get("format_version"), data.get("kind")
    _require(version == types.FORMAT_VERSION, "format_version", version, known)
    _require(kind == "eval", "kind", kind, '"eval"')
    _check("", data, Results)
    rows, samples, reference = data["rows"], data["samples"], data["reference"]
    _require(len(rows) > 0, "rows", rows, "at least one row")
    names = _unique("rows", rows, "name")
    quoted = ", ".join(map(repr, names))
    found = reference in names or any(row["method"] == reference for row in rows)
    accepted = f"the name or the method of a row; the names are {quoted}"
    _require(found, "reference", reference, accepted)
    for i, row in enumerate(rows):
        _check_row(f"rows[{i}]", row)
    _unique("samples", samples, "id")
    for i, sample in enumerate(samples):
        for name in sample["media"]:
            _require(name in names, f"samples[{i}].media: row", name, f"one of {quoted}")
    return typing.cast(Results, data)


def _check_row(place: str, row: dict[str, Any]) -> None:
    """Check the fields of a row that depend on each other."""
    if not row["available"]:
        _check(f"{place}.why", row["why"], types.Text)
    for key in SPEEDUPS if row["speedup"] is not None else ():
        _present(f"{place}.speedup", row["speedup"], key)
    if row["peak_memory_bytes"] is not None:
        rule, value = types.one_of(("gpu", "process")), row["peak_memory_of"]
        _require(rule.holds(value), f"{place}.peak_memory_of", value, rule.accepted)
    for name, metric in row["metrics"].items():
        if metric["value"] is None and not types.identical(metric):
            _present(f"{place}.metrics.{name}", metric, "why")


def _check(place: str, value: Any, kind: Any, null: str = "") -> None:
    """Check a value against a TypedDict or the type of a field; `null` is an addition to the message."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    plain = (types.PLAIN[kind],) if kind in types.PLAIN else ()
    for rule in arguments[1:] if origin is typing.Annotated else plain:
        try:
            ok = rule.holds(value)
        except (TypeError, AttributeError):  # a value of another type
            ok = False
        _require(ok, place, value, rule.accepted + null)
    if type(None) in arguments:
        if value is not None:
            _check(place, value, arguments[0], " or null")
    elif origin in (typing.Annotated, typing.NotRequired):
        _check(place, value, arguments[0], null)
    elif origin is list:
        items = "texts" if arguments[0] is str else "objects"
        _require(isinstance(value, list), place, value, f"a list of {items}" + null)
        for i, item in enumerate(value):
            _check(f"{place}[{i}]", item, arguments[0])
    elif origin is dict or typing.is_typeddict(kind):
        _require(isinstance(value, dict), place, value, "an object" + null)
        if origin is dict:
            fields = dict.fromkeys(value, arguments[1])
            for key in value if arguments[0] is not str else ():
                _check(f"{place}: phase", key, arguments[0])  # only phases have a rule
        else:
            fields = typing.get_type_hints(kind, include_extras=True)
        for key, field in fields.items():
            if typing.get_origin(field) is not typing.NotRequired:
                _present(place, value, key)
            if key in value:
                _check(f"{place}.{key}".lstrip("."), value[key], field)


def _present(place: str, value: dict[str, Any], key: str) -> None:
    if key not in value:
        raise ValueError(f"{f'{place}.{key}'.lstrip('.')} is missing")


def _require(ok: bool, place: str, value: Any, accepted: str) -> None:
    if not ok:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise ValueError(f"{place}={shown}: must be {accepted}")


def _unique(place: str, entries: Sequence[dict[str, Any]], key: str) -> list[str]:
    """Return the values of `key`, each of which may be used once."""
    seen: list[str] = []
    for i, entry in enumerate(entries):
        _require(entry[key] not in seen, f"{place}[{i}].{key}", entry[key], "a name used once")
        seen.append(entry[key])
    return seen
