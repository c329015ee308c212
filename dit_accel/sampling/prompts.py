"""`read_prompts`: prompts from txt, jsonl, csv and tsv files."""

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
"""DrawBench, COCO and our own captions.jsonl."""
_IGNORED = ("category", "challenge", "note", "tag", "include", "exclude", "dimension")
"""What PartiPrompts, DrawBench, GenEval and VBench say about a prompt."""
_NUMBERS = ("seed", "height", "width", "num_frames")


@dataclass(frozen=True)
class PromptRecord:
    """One prompt with settings of its own; None leaves the setting of the run."""

    id: str
    """Names the sample; a safe file name."""
    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    """Without one: the first seed + the place in the file, counted from 0."""
    height: int | None = None
    """Pixels."""
    width: int | None = None
    num_frames: int | None = None
    ref_path: str | None = None
    """A reference picture or clip, as it stands in the file."""

    def __post_init__(self) -> None:
        for name in ("id", "prompt"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{name}={value!r}: accepted is text that is not empty")
        for name in ("prompt", "negative_prompt", "ref_path"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name}={value!r}: accepted is text")
            if value is not None and not _is_whole(value):
                raise ValueError(f"{name}={value!r}: accepted is text of whole characters")
        if safe_name(self.id) != self.id:
            raise ValueError(
                f"id={self.id!r}: accepted is a safe file name, such as {safe_name(self.id)!r}"
            )
        for name in _NUMBERS:
            value = getattr(self, name)
            if value is None:
                continue
            if type(value) is not int or not (0 if name == "seed" else 1) <= value < 2**63:
                least = 0 if name == "seed" else 1
                raise ValueError(f"{name}={value!r}: accepted is an int >= {least} and below 2**63")

    def sampling_arguments(self) -> dict[str, Any]:
        """Return the arguments of a pipeline call that this record overrides."""
        names = ("negative_prompt", "height", "width", "num_frames")
        return {name: x for name in names if (x := getattr(self, name)) is not None}


_FIELDS = [x.name for x in fields(PromptRecord)]


def number_prompts(prompts: Iterable[str]) -> list[PromptRecord]:
    """Return records with the ids 00000, 00001, ..."""
    return [PromptRecord(f"{i:05d}", prompt) for i, prompt in enumerate(prompts)]


def prompts_sha256(prompts: Sequence[PromptRecord]) -> str:
    """Return a hash that is equal for equal records, however they were stored."""
    data = json.dumps([asdict(x) for x in prompts], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(data.encode()).hexdigest()


def read_prompts(path: str | os.PathLike) -> list[PromptRecord]:
    """Read the records of a prompts file, in its order.

    - .txt (or no suffix): a prompt a line; empty lines are left out.
    - .jsonl: an object a line, with the fields of `PromptRecord`; only `prompt` is needed.
    - .csv, .tsv: a header with the same names, in any case; `Prompts`, `caption` and `text` count as
      `prompt`. Category, Challenge, Note, tag, include, exclude and dimension are ignored.

    The id is the `id` of the line, made a safe file name, or the place in the file: 00000, 00001, ...

    Raises:
        ValueError: not a readable file, no prompt in it, an empty prompt, an unknown field, a value of the
            wrong kind, or an id that comes twice; with the line.
    """
    path = Path(path)
    argument = f"prompts_file={str(path)!r}"
    suffix = path.suffix.lower()
    if suffix not in ("", *SUFFIXES):
        raise ValueError(f"{argument}: accepted are {', '.join(SUFFIXES)} files")
    try:
        text = path.read_text(encoding="utf-8-sig")  # Excel begins its files with a mark
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
                raise ValueError(f"id={record.id!r}: line {first} has it too; accepted is one each")
            records.append(record)
    except ValueError as error:
        raise ValueError(f"{argument}, line {getattr(error, 'line', line)}: {error}") from None
    if not records:
        raise ValueError(f"{argument}: holds no prompt")
    return records


class _LineError(ValueError):
    """Where the reader itself stumbled."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def _record(row: dict[str, Any], place: int) -> PromptRecord:
    values: dict[str, Any] = {}
    for key, value in row.items():
        name = key.strip().lower()
        name = _ALIASES.get(name, name)
        if name in _IGNORED:
            continue
        if name not in _FIELDS:
            close = difflib.get_close_matches(name, _FIELDS, 1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"unknown field {key!r}{hint}; accepted are {', '.join(_FIELDS)}")
        if name in values:
            raise ValueError(f"{key!r}: a second {name!r}; accepted is one")
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
    r"""JSON can hold half a character, such as "\ud800", which no file or tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text_rows(text: str, _: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, {"prompt": line}


def _json_rows(text: str, _: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _LineError(number, f"not JSON ({error})") from None
        if not isinstance(row, dict):
            raise _LineError(number, "accepted is a JSON object with prompt")
        yield number, row


def _table_rows(text: str, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # Fields of a tsv file stand as they are: PartiPrompts has quotation marks inside of prompts.
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
                raise ValueError(f"{len(cells)} cells; the header has {len(header)}")
            row = dict(zip(header, cells, strict=False))
            yield reader.line_num, {key: _value(key, x) for key, x in row.items() if x.strip()}
    except (ValueError, csv.Error) as error:
        raise _LineError(reader.line_num, str(error)) from None


def _check_header(header: list[str]) -> None:
    if not any(_is_prompt(x) for x in header):
        raise ValueError(f"the header has no column prompt, only {', '.join(header)}")
    if len({x.strip().lower() for x in header}) != len(header):
        raise ValueError("two columns have one name")
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
        raise ValueError(f"{key.strip()}={cell!r}: accepted is a whole number") from None


def _unquoted(cell: str) -> str:
    """Spreadsheets put quotation marks around a cell that holds some, and double those."""
    inner = cell[1:-1]
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' in inner:
        plain = inner.replace('""', "")
        if '"' not in plain:
            return inner.replace('""', '"')
    return cell
