"""Prompt records, and reading them from txt, jsonl, csv and tsv files."""

import csv
import difflib
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dit_accel.sampling.names import name_key, safe_name

SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv")
_ALIASES = {"prompts": "prompt", "caption": "prompt", "text": "prompt"}
"""Names of the field `prompt` in DrawBench, COCO and the captions of `dit-accel demo make-data`."""
_IGNORED = ("category", "challenge", "note", "tag", "include", "exclude", "dimension")
"""Ignored fields of PartiPrompts, DrawBench, GenEval and VBench."""
_NUMBERS = ("seed", "height", "width", "num_frames")


@dataclass(frozen=True)
class PromptRecord:
    """Prompt with its own settings. None keeps the setting of the run."""

    id: str
    """Name of the sample; must be a safe file name."""
    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    """Default: seed of the run + index of the sample."""
    height: int | None = None
    """Pixels."""
    width: int | None = None
    num_frames: int | None = None
    ref_path: str | None = None
    """Path of a reference image or clip, as written in the file."""

    def __post_init__(self) -> None:
        for name in ("id", "prompt"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{name}={value!r}: must be a str that is not empty")
        for name in ("prompt", "negative_prompt", "ref_path"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name}={value!r}: must be a str")
            if value is not None and not _is_whole(value):
                raise ValueError(f"{name}={value!r}: must be a str without lone surrogates")
        if safe_name(self.id) != self.id:
            raise ValueError(
                f"id={self.id!r}: must be a safe file name, such as {safe_name(self.id)!r}"
            )
        for name in _NUMBERS:
            value = getattr(self, name)
            if value is None:
                continue
            if type(value) is not int or not (0 if name == "seed" else 1) <= value < 2**63:
                least = 0 if name == "seed" else 1
                raise ValueError(f"{name}={value!r}: must be an int in [{least}, 2**63)")

    def sampling_arguments(self) -> dict[str, Any]:
        """Return the arguments of the pipeline call that this record sets."""
        names = ("negative_prompt", "height", "width", "num_frames")
        return {name: x for name in names if (x := getattr(self, name)) is not None}


_FIELDS = [x.name for x in fields(PromptRecord)]


def number_prompts(prompts: Iterable[str]) -> list[PromptRecord]:
    """Return a record with the id 00000, 00001, ... for each prompt."""
    return [PromptRecord(f"{i:05d}", prompt) for i, prompt in enumerate(prompts)]


def prompts_sha256(prompts: Sequence[PromptRecord]) -> str:
    """Return a hash of the records. It does not depend on the format of the prompts file."""
    data = json.dumps([asdict(x) for x in prompts], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(data.encode()).hexdigest()


def read_prompts(path: str | os.PathLike) -> list[PromptRecord]:
    """Return the records of a prompts file in the order of the file.

    - .txt (or no suffix): one prompt per line. Empty lines are ignored.
    - .jsonl: one object per line with the fields of `PromptRecord`. Only `prompt` is required.
    - .csv, .tsv: a header with the same names, in any case. `Prompts`, `caption` and `text` are read as `prompt`.
      Category, Challenge, Note, tag, include, exclude and dimension are ignored.

    The id is the `id` of the line, converted to a safe file name. Default: the index in the file as 00000, 00001, ...

    Raises:
        ValueError: the file is unreadable or has no prompts, a prompt is empty, a field is unknown, a value has the wrong
            type, or an id occurs twice. The message has the line number.
    """
    path = Path(path)
    argument = f"prompts_file={str(path)!r}"
    suffix = path.suffix.lower()
    if suffix not in ("", *SUFFIXES):
        raise ValueError(f"{argument}: must be a {', '.join(SUFFIXES)} file")
    try:
        text = path.read_text(encoding="utf-8-sig")  # Excel writes a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{argument}: not a readable text file ({error})") from None
    rows = {".jsonl": _json_rows, ".csv": _table_rows, ".tsv": _table_rows}.get(suffix, _text_rows)
    records: list[PromptRecord] = []
    lines: dict[str, int] = {}
    line = 0
    try:
        for line, row in rows(text, "\t" if suffix == ".tsv" else ","):
            record = _record(row, len(records))
            first = lines.setdefault(name_key(record.id), line)
            if first != line:
                raise ValueError(
                    f"id={record.id!r}: is also the id of line {first}; must be unique"
                )
            records.append(record)
    except ValueError as error:
        raise ValueError(f"{argument}, line {getattr(error, 'line', line)}: {error}") from None
    if not records:
        raise ValueError(f"{argument}: contains no prompts")
    return records


class _LineError(ValueError):
    """Error at a line that the parser reports."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def _record(row: dict[str, Any], place: int) -> PromptRecord:
    """Return the record of a row; `place` is its index in the file."""
    values: dict[str, Any] = {}
    for key, value in row.items():
        name = key.strip().lower()
        name = _ALIASES.get(name, name)
        if name in _IGNORED:
            continue
        if name not in _FIELDS:
            close = difflib.get_close_matches(name, _FIELDS, 1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"unknown field {key!r}{hint}; must be one of {', '.join(_FIELDS)}")
        if name in values:
            raise ValueError(f"{key!r}: {name!r} is given twice")
        values[name] = value
    given = values.get("id")
    if given is None:
        values["id"] = f"{place:05d}"
    elif type(given) in (int, str) and str(given).strip():
        values["id"] = safe_name(str(given))
    values.setdefault("prompt", "")
    if isinstance(values["prompt"], str):
        values["prompt"] = values["prompt"].strip()
    return PromptRecord(**values)


def _is_whole(text: str) -> bool:
    r"""Return whether the text can be encoded. JSON can contain lone surrogates such as "\ud800", which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text_rows(text: str, _: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the fields of each line of a text file."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, {"prompt": line}


def _json_rows(text: str, _: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the fields of each line of a jsonl file."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _LineError(number, f"not JSON ({error})") from None
        if not isinstance(row, dict):
            raise _LineError(
                number, f"{line.strip()[:40]}: must be a JSON object with the field prompt"
            )
        yield number, row


def _table_rows(text: str, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the fields of each row of a csv or tsv file."""
    # Quotation marks of a tsv file are part of the text: PartiPrompts has prompts with quotation marks.
    reader = csv.reader(
        io.StringIO(text),
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL,
    )
    header: list[str] = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if delimiter == "\t":
                cells = [_unquoted(cell) for cell in cells]
            if not header:
                header = cells
                _check_header(header)
                continue
            if len(cells) > len(header):
                raise ValueError(
                    f"{len(cells)} cells; must be at most {len(header)}, as in the header"
                )
            row = dict(zip(header, cells, strict=False))
            yield reader.line_num, {key: _value(key, x) for key, x in row.items() if x.strip()}
    except (ValueError, csv.Error) as error:
        raise _LineError(reader.line_num, str(error)) from None


def _check_header(header: list[str]) -> None:
    """Raise ValueError if the header of a table has no column `prompt`, duplicates or unknown names."""
    if not any(_is_prompt(x) for x in header):
        raise ValueError(f"header={', '.join(header)}: must have the column prompt")
    if len({x.strip().lower() for x in header}) != len(header):
        raise ValueError(f"header={', '.join(header)}: column names must be unique")
    _record({x: "x" if _is_prompt(x) else None for x in header}, 0)


def _is_prompt(key: str) -> bool:
    name = key.strip().lower()
    return _ALIASES.get(name, name) == "prompt"


def _value(key: str, cell: str) -> Any:
    if key.strip().lower() not in _NUMBERS:
        return cell
    try:
        return int(cell)
    except ValueError:
        raise ValueError(f"{key.strip()}={cell!r}: must be an int") from None


def _unquoted(cell: str) -> str:
    """Remove the quotation marks that spreadsheets add to a cell with quotation marks, and undouble those inside."""
    inner = cell[1:-1]
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' in inner:
        plain = inner.replace('""', "")
        if '"' not in plain:
            return inner.replace('""', '"')
    return cell
