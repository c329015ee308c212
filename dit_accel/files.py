"""Atomic writing, and the files that travel with the package."""

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
    """Yield a temporary sibling of `path` to write to; it takes the name `path` if the block succeeds.

    On any error the sibling is removed and whatever stood at `path` is left as it was.

    Args:
        path: file to write.
        suffix: suffix of the sibling. Default: that of `path`, because writers choose the format by it.

    Raises:
        OSError: the file could not be written; `filename` is `path`, never the temporary sibling.
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
            raise  # another file than the one that is written here
        raise OSError(error.errno or errno.EIO, _reason(error), str(path)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes `path` if the block succeeds.

    `path` must not exist yet or be an empty folder. On any error nothing of it is left.

    Raises:
        OSError: it could not be written; `filename` lies in `path`, never in the temporary folder.
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
    """Yield a temporary folder; its files move into `folder` if the block succeeds, JSON files last.

    Files of the same names are replaced. On any error in the block `folder` is as it was.

    Raises:
        OSError: a file could not be written; `filename` lies in `folder`.
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
    """Turn an OSError inside the block into a RuntimeError of one line that names the file.

    Args:
        advice: what the line ends with, such as what is finished already.
    """
    try:
        yield
    except OSError as error:
        where = "output" if error.filename is None else str(error.filename)
        ending = f"; {advice}" if advice else ""
        raise RuntimeError(f"{where}: could not be written ({_reason(error)}){ending}") from error


def sync(path: str | os.PathLike) -> None:
    """Bring a file to the disk, or the names of the files in a folder, where the system can do that."""
    if os.name != "posix" and Path(path).is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_renamed(error: OSError, temporary: Path, path: Path) -> NoReturn:
    """Raise the error with the name that a file in the temporary folder was to get."""
    named = Path(error.filename) if isinstance(error.filename, str) else temporary
    if not named.is_relative_to(temporary):
        raise error  # another file than those that are written here
    place = str(path / named.relative_to(temporary))
    raise OSError(error.errno or errno.EIO, _reason(error), place) from error


def _reason(error: OSError) -> str:
    """Return why, in one line: imageio appends all of ffmpeg's output."""
    return (error.strerror or str(error)).partition("\n")[0]


def write_json(path: str | os.PathLike, data: dict[str, Any]) -> None:
    """Write `data` as indented JSON, atomically."""
    # What a killed process leaves must not pass for a JSON file.
    with atomic_path(path, suffix=".part") as temporary:
        temporary.write_text(
            json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def check_writable(directory: str | os.PathLike, argument: str) -> Path:
    """Create `directory` if needed and prove that a file can be written there.

    Raises:
        ValueError: it cannot; the message names `argument`.
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
    """Prove that a file can be written at `path`, and create its folder if needed.

    Raises:
        ValueError: it cannot; the message names `argument`.
    """
    if Path(path).is_dir():
        raise ValueError(f"{argument}={str(path)!r}: is a folder; accepted is the name of a file")
    check_writable(Path(path).parent, argument)


def model_source(name: str | os.PathLike) -> str | os.PathLike:
    """Return where to load a model from: the folder of an embedded model for its name, else `name` itself.

    A folder of that name with a model in it, below the current one, is meant before the embedded model.

    Args:
        name: "tiny-wan", "tiny-sd3", "tiny-lumina2", or the folder or hub id of a repository.
    """
    if str(name) not in EMBEDDED_MODELS or (Path(name) / "model_index.json").is_file():
        return name
    return asset(str(name))


def asset(name: str) -> Path:
    """Return the path of a bundled asset, in an installed wheel or in a source checkout.

    Raises:
        FileNotFoundError: no such asset.
    """
    package = Path(__file__).resolve().parent
    for root in (package / "assets", package.parent / "assets"):
        if (root / name).exists():
            return root / name
    raise FileNotFoundError(
        f"asset {name!r} is neither in the package nor in the checkout's assets/"
    )
