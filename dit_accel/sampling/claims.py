"""`claimed_stem`: a file number of a folder that any number of processes write into."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

CLAIM = ".{:04d}.claim"
"""Empty file of the process that writes the files of a number; hidden, so that no reader takes it for a sample."""
_NUMBER = re.compile(r"([0-9]{4,6})(?![0-9])")


@contextlib.contextmanager
def claimed_stem(folder: Path) -> Iterator[Path]:
    """Claim the next number that nobody uses; yield the stem `folder/0000` of its files.

    The claim is a file that only one process can create (O_EXCL, which network file systems know too). It
    goes when the block ends. Where the block fails, the files of the number go as well. A process that is
    killed leaves its claim and the files that are complete by then, and the number is not used again.
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
    """Claim the number, unless another process has it or had it."""
    claim = folder / CLAIM.format(number)
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        return False
    # Another process may have finished with this number since the folder was read. Its files were there
    # before its claim went, so that they are seen now.
    if not _files_of(folder, number):
        return True
    claim.unlink(missing_ok=True)
    return False


def _next_number(folder: Path) -> int:
    """Return the number after the largest one in the folder, so that nothing is overwritten."""
    found = [_NUMBER.match(x.name) for x in folder.iterdir()]
    return max((int(x.group(1)) for x in found if x), default=-1) + 1


def _files_of(folder: Path, number: int) -> list[Path]:
    """Return the files whose name begins with the number."""
    digits = f"{number:04d}"
    return [x for x in folder.iterdir() if re.match(rf"{digits}(?![0-9])", x.name)]
