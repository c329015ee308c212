"""Atomic writing of files, and bundled assets."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

EMBEDDED_MODELS = ("tiny-wan", "tiny-sd3", "tiny-lumina2")
"""Names of the trained demo models among the assets."""


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, *, suffix: str | None = None) -> Iterator[Path]:
    """Context manager for atomic writing: yield a temporary file, which is renamed to `path` if the block succeeds.

    On any error the temporary file is removed and `path` is unchanged.

    Args:
        path: file to write.
        suffix: suffix of the temporary file. Default: that of `path`, because writers choose the format by it.

    Raises:
        OSError: the file could not be written; `filename` is `path` and not the temporary file.
    """
    path, temporary = Path(path), None
    try:
        handle, name = tempfile.mkstemp(
            prefix=".tmp-", suffix=path.suffix if suffix is None else suffix, dir=path.parent
        )
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private; the result is an ordinary file
        os.replace(temporary, path)
    except OSError as error:
        if isinstance(error.filename, str) and Path(error.filename).parent != path.parent:
            raise  # the error is about another file
        raise OSError(error.errno or errno.EIO, _reason(error), str(path)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Context manager for an atomic folder: yield a temporary folder, which is renamed to `path` if the block succeeds.

    `path` must not exist, or be an empty folder. On any error the temporary folder is removed.

    Raises:
        OSError: the folder could not be written; `filename` is in `path` and not in the temporary folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=path.parent))
    temporary.chmod(0o755)  # mkdtemp makes it private; the result is an ordinary folder
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        _raise_renamed(error, temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """Context manager for several files: yield a temporary folder, whose files move to `folder` if the block succeeds.

    JSON files move last. Files of the same names are replaced. On any error in the block, `folder` is unchanged.

    Raises:
        OSError: a file could not be written; `filename` is in `folder`.
    """
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder))
    try:
        yield temporary
        for path in sorted(temporary.iterdir(), key=lambda x: (x.suffix == ".json", x.name)):
            os.replace(path, folder / path.name)
    except OSError as error:
        _raise_renamed(error, temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def naming_failures(advice: str = "") -> Iterator[None]:
    """Context manager that turns an OSError into a RuntimeError with one line that names the file.

    Args:
        advice: end of the line, such as the number of finished files. Default: none.
    """
    try:
        yield
    except OSError as error:
        where = "output" if error.filename is None else str(error.filename)
        ending = f"; {advice}" if advice else ""
        raise RuntimeError(f"{where}: could not be written ({_reason(error)}){ending}") from error


def sync(path: str | os.PathLike) -> None:
    """Flush a file, or the entries of a folder, to the disk, if the system supports it."""
    if os.name != "posix" and Path(path).is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_renamed(error: OSError, temporary: Path, path: Path) -> NoReturn:
    """Raise the error with the final name of a file in the temporary folder."""
    named = Path(error.filename) if isinstance(error.filename, str) else temporary
    if not named.is_relative_to(temporary):
        raise error  # the error is about another file
    place = str(path / named.relative_to(temporary))
    raise OSError(error.errno or errno.EIO, _reason(error), place) from error


def _reason(error: OSError) -> str:
    """Return the first line of the reason, because imageio appends the output of ffmpeg."""
    return (error.strerror or str(error)).partition("\n")[0]


def write_json(path: str | os.PathLike, data: dict[str, Any]) -> None:
    """Write `data` as indented JSON, atomically."""
    # Another suffix, so that the file of a killed process is not taken for a JSON file.
    with atomic_path(path, suffix=".part") as temporary:
        temporary.write_text(
            json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def check_writable(directory: str | os.PathLike, argument: str) -> Path:
    """Create a folder if needed, and check that a file can be written there. Return its path.

    Args:
        directory: the folder.
        argument: name of the argument, for the error message.

    Raises:
        ValueError: no file can be written there.
    """
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".tmp-") as probe:
            probe.write(b"\0" * 65536)  # a full disk takes an empty file but not this
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise ValueError(
            f"{argument}={str(directory)!r}: cannot write there ({error.strerror or error}); "
            "accepted is a folder that can be created and has space"
        ) from error
    return path


def check_file(path: str | os.PathLike, argument: str) -> None:
    """Check that a file can be written at `path`, and create its folder if needed.

    Args:
        path: the file.
        argument: name of the argument, for the error message.

    Raises:
        ValueError: the file cannot be written.
    """
    if Path(path).is_dir():
        raise ValueError(f"{argument}={str(path)!r}: is a folder; accepted is the name of a file")
    check_writable(Path(path).parent, argument)


def model_source(name: str | os.PathLike) -> str | os.PathLike:
    """Return the folder of an embedded model for its name; return any other name unchanged.

    A folder of that name in the working directory comes first, if it holds a model.

    Args:
        name: "tiny-wan", "tiny-sd3", "tiny-lumina2", or the folder or hub id of a repository.
    """
    if str(name) not in EMBEDDED_MODELS or (Path(name) / "model_index.json").is_file():
        return name
    return asset(str(name))


def asset(name: str) -> Path:
    """Return the path of a bundled asset, in an installed wheel or in a source checkout.

    Raises:
        FileNotFoundError: there is no asset of this name.
    """
    package = Path(__file__).resolve().parent
    for root in (package / "assets", package.parent / "assets"):
        if (root / name).exists():
            return root / name
    raise FileNotFoundError(
        f"asset {name!r} is neither in the package nor in the checkout's assets/"
    )
