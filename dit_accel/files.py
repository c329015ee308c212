"""Atomic writing, and the files that travel with the package."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary sibling of `path` to write to; it takes the name `path` if the block succeeds.

    The sibling keeps the suffix, because writers choose the format by it. On any error it is
    removed and whatever stood at `path` is left as it was.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=".tmp-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private; the result is an ordinary file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary sibling folder that becomes `path` if the block succeeds.

    `path` must not exist yet or be an empty folder. On any error nothing of it is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=path.parent))
    temporary.chmod(0o755)  # mkdtemp makes it private; the result is an ordinary folder
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | os.PathLike, data: dict[str, Any]) -> None:
    """Write `data` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
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


EMBEDDED_MODELS = ("tiny-sd3", "tiny-wan")
"""Models that travel with the package; their names stand wherever a model can be named."""


def model_source(name: str | os.PathLike) -> str | Path:
    """Return the folder of an embedded model, and any other name as it is.

    A folder in the current directory that has the name of an embedded model comes first.

    Args:
        name: an embedded model ("tiny-sd3", "tiny-wan"), a folder or a hub id.
    """
    if str(name) in EMBEDDED_MODELS and not Path(name).is_dir():
        return asset(str(name))
    return name if isinstance(name, str) else Path(name)


def asset(name: str) -> Path:
    """Path of a bundled asset, in an installed wheel or in a source checkout.

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
