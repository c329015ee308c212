"""`read_captions`: find the videos and pictures of a folder and their captions."""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from dit_accel.config.base import is_number, suggest
from dit_accel.finetune.data.tables import TABLE_SUFFIXES, find_table, table_rows
from dit_accel.sampling.image_files import IMAGE_SUFFIXES
from dit_accel.sampling.image_files import VIDEO_SUFFIXES as _VIDEO_SUFFIXES

VIDEO_SUFFIXES = (
    *_VIDEO_SUFFIXES,
    *(".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv", ".ogv", ".3gp", ".y4m"),
)
"""Suffixes of supported videos. Files with ".gif" and ".webp" may be animated pictures."""
RANGE = ("start_seconds", "end_seconds")
"""Optional columns of a table that select a part of a video."""


@dataclass(frozen=True)
class Item:
    """Video, part of a video, or picture, with its caption."""

    id: str
    """Path relative to the folder, with slashes. A part of a video has the suffix "@start-end"."""
    path: Path
    """Path of the file."""
    caption: str
    """Caption of the file."""
    start: float = 0.0
    """Start of the part in seconds."""
    end: float | None = None
    """End of the part in seconds; None: the end of the video."""

    @property
    def is_picture(self) -> bool:
        """True if the file is read with Pillow, False if it is a video."""
        return is_picture(self.path)


def is_picture(path: PurePath) -> bool:
    """Return True if the suffix belongs to a picture, which may be animated."""
    return path.suffix.lower() in (*IMAGE_SUFFIXES, ".gif")


def read_captions(
    folder: str | os.PathLike,
    *,
    caption_column: str = "text",
    video_column: str = "file_name",
    argument: str = "instance_data_dir",
) -> list[Item]:
    """Read a folder of videos and pictures with captions.

    Captions come from a table in the folder with the suffix .jsonl, .csv or .tsv. It is named metadata or captions,
    or is the only file with such a suffix. Each row names a file in the folder (symbolic links are followed) and its
    caption. The columns `start_seconds` and `end_seconds` select a part of a video. Other columns are ignored.
    Without a table, each file needs a caption in a .txt file of the same name.

    Args:
        folder: folder to read, including subfolders. Names that begin with a dot are ignored.
        caption_column: column of the table that holds captions.
        video_column: column of the table that holds file names.
        argument: name of the option for `folder`, for messages.

    Returns:
        The items in the order of the table, or sorted by name without a table.

    Raises:
        ValueError: if there is no captioned file or more than one table, if a caption is missing or empty, or if a
            file is missing, outside of the folder, of an unknown type or listed twice.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(
            f"{argument}={str(folder)!r}: no such folder; expected a folder of videos or pictures"
        )
    files = _media_files(root)
    table = find_table(root, argument)
    if table is None:
        return _from_text_files(root, files, argument)
    items = _from_table(root, table, caption_column, video_column)
    named = {str(x.path.relative_to(root).as_posix()) for x in items}
    unnamed = [x for x in files if x not in named]
    if unnamed:
        raise ValueError(
            f"{table}: no row for {some(unnamed)}; each video and picture in the folder needs a caption"
        )
    return items


def some(names: Iterable[str], most: int = 5) -> str:
    """Return the first `most` names in one line, followed by the number of further names."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _media_files(root: Path) -> list[str]:
    """Return the sorted relative paths of all videos and pictures in the folder, with slashes."""
    suffixes = (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)
    return sorted(x for x in _files(root) if PurePosixPath(x).suffix.lower() in suffixes)


def _files(root: Path) -> Iterator[str]:
    for place, folders, names in os.walk(root):
        folders[:] = [x for x in folders if not x.startswith(".")]
        for name in names:
            if not name.startswith("."):
                yield (Path(place) / name).relative_to(root).as_posix()


def _from_text_files(root: Path, files: list[str], argument: str) -> list[Item]:
    where = f"{argument}={str(root)!r}"
    if not files:
        raise ValueError(
            f"{where}: holds neither a table of captions ({', '.join(TABLE_SUFFIXES)}) nor videos or pictures"
        )
    texts: dict[str, list[str]] = {
        x[: -len(".txt")]: [] for x in _files(root) if x.endswith(".txt")
    }
    missing = []
    for file in files:
        stem = file[: -len(PurePosixPath(file).suffix)]
        if stem in texts:
            texts[stem].append(file)
        else:
            missing.append(file)
    if missing:
        raise ValueError(
            f"{where}: no caption for {some(missing)}; expected a .txt file of the same name for each file, or one table "
            "such as metadata.jsonl"
        )
    alone = [f"{stem}.txt" for stem, found in texts.items() if not found]
    if alone:
        raise ValueError(f"{where}: no video or picture for the captions {some(alone)}")
    for stem, found in texts.items():
        if len(found) > 1:
            raise ValueError(
                f"{where}: {stem}.txt is the caption of several files: {some(found)}; expected one file per caption"
            )
    items = []
    for file in files:
        path = root / file
        text = path.with_suffix(".txt")
        try:
            caption = text.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{text}: not a readable text file ({error})") from None
        if not caption:
            raise ValueError(f"{text}: the file is empty; expected a caption")
        items.append(Item(file, path, caption))
    return items


def _from_table(root: Path, table: Path, caption_column: str, video_column: str) -> list[Item]:
    items: list[Item] = []
    lines: dict[str, int] = {}
    for line, row in table_rows(table):
        try:
            item = _item(root, row, caption_column, video_column)
            first = lines.setdefault(item.id, line)
            if first != line:
                raise ValueError(f"{item.id!r} is also in line {first}; expected one row per file")
        except ValueError as error:
            raise ValueError(f"{table}, line {line}: {error}") from None
        items.append(item)
    if not items:
        raise ValueError(f"{table}: holds no rows")
    missing = [x.id for x in items if not x.path.is_file()]
    if missing:
        raise ValueError(f"{table}: no such file in the folder: {some(missing)}")
    return items


def _item(root: Path, row: dict[str, Any], caption_column: str, video_column: str) -> Item:
    options = {"video_column": video_column, "caption_column": caption_column}
    for option, column in options.items():
        if column not in row:
            raise ValueError(
                f"no column {column!r}{suggest(column, list(row))}; the columns are {', '.join(map(repr, row))}; set --{option}"
            )
        if not isinstance(row[column], str) or not row[column].strip():
            raise ValueError(f"{column}={row[column]!r}: must be non-empty text")
    name = row[video_column].strip()
    file = PurePosixPath(name)
    if file.is_absolute() or ".." in file.parts or "\\" in name or "\0" in name:
        raise ValueError(
            f"{video_column}={name!r}: outside of the folder; expected a relative path with slashes"
        )
    if file.suffix.lower() not in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES):
        raise ValueError(
            f"{video_column}={name!r}: unknown suffix; expected {', '.join((*VIDEO_SUFFIXES, *IMAGE_SUFFIXES))}"
        )
    start, end = (_seconds(row, column) for column in RANGE)
    begin = 0.0 if start is None else start
    if (start is not None or end is not None) and is_picture(file):
        raise ValueError(f"{' and '.join(RANGE)} of {name!r}: supported only for videos")
    if end is not None and end <= begin:
        raise ValueError(f"end_seconds={end:g}: must be greater than start_seconds={begin:g}")
    part = "" if start is end is None else f"@{begin:g}-{'' if end is None else f'{end:g}'}"
    return Item(f"{file}{part}", root / file, row[caption_column].strip(), begin, end)


def _seconds(row: dict[str, Any], column: str) -> float | None:
    value = row.get(column)
    if value is None or value == "":
        return None
    try:
        number = float(value) if isinstance(value, str) or is_number(value) else math.nan
    except ValueError:
        number = math.nan
    if not (0 <= number < math.inf):
        raise ValueError(f"{column}={value!r}: must be a number of seconds >= 0")
    return number
