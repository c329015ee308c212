"""Numbered file names in a folder that several processes write into at the same time."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

CLAIM = ".{:04d}.claim"
"""Name of the empty file that reserves a number for one process. It is hidden, so readers do not take it for a sample."""
_NUMBER = re.compile(r"([0-9]{4,6})(?![0-9])")


@contextlib.contextmanager
def claimed_stem(folder: Path) -> Iterator[Path]:
    """Reserve the next free number and yield the stem `folder/0000` of its files.

    The claim is a file that only one process can create (O_EXCL, which network file systems support too). It is removed
    when the block ends. If the block raises, the files of the number are removed as well. A killed process leaves its
    claim and its complete files, and the number is not used again.
    """
    number = _next_number(folder)
    while not _claim(folder, number):
        number += 1
    try:
        yield folder / f"{number:04d}"
    except BaseException:
        for path in filter(Path.is_file, _files_of(folder, number)):
            path.unlink(missing_ok=True)
        raise
    finally:
        (folder / CLAIM.format(number)).unlink(missing_ok=True)


def _claim(folder: Path, number: int) -> bool:
    """Create the claim of a number. Return False if another process holds or has used the number."""
    claim = folder / CLAIM.format(number)
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        return False
    # Another process may have used this number since the folder was listed. It wrote its files before it removed its
    # claim, so its files exist now.
    if not _files_of(folder, number):
        return True
    claim.unlink(missing_ok=True)
    return False


def _next_number(folder: Path) -> int:
    """Return the number after the largest number in the folder."""
    found = [_NUMBER.match(x.name) for x in folder.iterdir()]
    return max((int(x.group(1)) for x in found if x), default=-1) + 1


def _files_of(folder: Path, number: int) -> list[Path]:
    """Return the files whose names begin with the number."""
    digits = f"{number:04d}"
    return [x for x in folder.iterdir() if re.match(rf"{digits}(?![0-9])", x.name)]
