"""Read tables of captions (JSON lines, CSV and TSV files) as rows with line numbers."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv")
_NAMES = ("metadata", "captions")
"""Names of a table that is used even if the folder holds other tables, in order of precedence."""


def find_table(folder: Path, argument: str) -> Path | None:
    """Return the table of captions of a folder, or None if there is no table.

    Raises:
        ValueError: if several files could be the table.
    """
    tables = sorted(
        x
        for x in folder.iterdir()
        if x.suffix.lower() in TABLE_SUFFIXES and x.is_file() and not x.name.startswith(".")
    )
    for name in _NAMES:
        tables = [x for x in tables if x.stem.lower() == name] or tables
        if len(tables) == 1:
            return tables[0]
    if tables:
        raise ValueError(
            f"{argument}={str(folder)!r}: several tables of captions: {', '.join(x.name for x in tables)}; keep one of them, "
            "or name one of them metadata"
        )
    return None


def table_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the columns of each row.

    Raises:
        ValueError: if the table cannot be read. The message names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheet programs write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable text file ({error})") from None
    suffix = path.suffix.lower()
    yield from _json_rows(path, text) if suffix == ".jsonl" else _cell_rows(path, text, suffix)


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # `splitlines` would also split at characters that JSON strings may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object")
        yield number, row


def _cell_rows(path: Path, text: str, suffix: str) -> Iterator[tuple[int, dict[str, Any]]]:
    tabs = suffix == ".tsv"
    # TSV files have no quoting: captions may begin with a quotation mark.
    reader = csv.reader(
        io.StringIO(text),
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        strict=True,
    )
    header: list[str] = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [x.strip() for x in cells]
                if len(set(header)) != len(header):
                    raise ValueError(f"column names must be unique: {', '.join(header)}")
                continue
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} cells, but the header has {len(header)}")
            yield reader.line_num, dict(zip(header, cells, strict=True))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
