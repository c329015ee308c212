"""Progress of a sample set on disk: a journal a rank while it runs, one manifest at the end.

Ranks share nothing but the folder. A rank appends a line to its journal once the files of a sample are
complete; when it has finished it merges all journals, if together they hold every sample. Two ranks that
finish at once both merge, and write the same manifest. A journal goes only after the manifest stands.
What is left of other settings goes after the files that it lists, and never by the hand of two ranks.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.files import atomic_path, write_json
from dit_accel.sampling.manifest import (
    FORMAT_VERSION,
    JOURNAL,
    MANIFEST,
    differences,
    is_inside,
    read_manifest,
)
from dit_accel.sampling.plan import VBENCH_FOLDER

Record = dict[str, Any]
_ATTEMPTS = 10
"""To read the journals while other ranks merge."""


@dataclass(frozen=True)
class Shards:
    """Ranks of a run, and which rank makes which sample."""

    owner: dict[str, int]
    """Rank by id, for all samples, in the order of the manifest."""
    rank: int
    world_size: int


@dataclass(frozen=True)
class _Progress:
    """Content of one journal or manifest."""

    header: dict[str, Any]
    samples: dict[str, Record]


@dataclass(frozen=True)
class Found:
    """Samples and files of earlier runs in a folder."""

    samples: dict[str, Record] | None
    """Made with the same settings; None: nobody has begun."""
    old_files: list[str]
    """Of samples made with other settings, without those that `samples` have too."""
    stale: list[Path]
    """Journals and manifest that hold none of `samples`."""


class Journal:
    """Journal of one rank: a line for each finished sample."""

    def __init__(
        self,
        folder: Path,
        shards: Shards,
        header: dict[str, Any],
        samples: Mapping[str, Record],
        redo: Iterable[str] = (),
    ) -> None:
        """Start the file with the known samples; `redo` are ids that others may still believe to be intact."""
        self._path = folder / JOURNAL.format(shards.rank)
        first = header | {"world_size": shards.world_size, "rank": shards.rank, "redo": [*redo]}
        lines = [first, *({"id": name} | record for name, record in samples.items())]
        with atomic_path(self._path) as temporary:
            temporary.write_text("".join(map(_line, lines)), encoding="utf-8")
        self._file = self._path.open("a", encoding="utf-8")

    def append(self, name: str, record: Record) -> None:
        """Add a sample whose files are complete; the line is on disk when this returns."""
        self._file.write(_line({"id": name} | record))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def known_samples(folder: Path, settings: Mapping[str, Any], *, overwrite: bool) -> Found:
    """Return the samples of earlier runs that were made with these settings, and the files of others.

    Raises:
        ValueError: samples made with other settings, or a damaged file, without `overwrite`.
    """
    samples: dict[str, Record] | None = None
    old_files: list[str] = []
    stale: list[Path] = []
    for path, progress in _read_all(folder).items():
        if isinstance(progress, ValueError):
            if not overwrite:
                raise ValueError(f"{progress}; overwrite, or choose another folder")
            stale.append(path)
        elif different := differences(_settings(progress, settings), settings):
            if not overwrite:
                raise ValueError(
                    f"output_dir={str(folder)!r}: holds samples of other settings: {'; '.join(different[:6])}; "
                    "overwrite, or choose another folder"
                )
            old_files += [file for x in progress.samples.values() for file in x.get("files", [])]
            stale.append(path)
        else:
            samples = (samples or {}) | progress.samples
    # A journal of another rank that has not begun yet can list files that this set has replaced since.
    own = {file for x in (samples or {}).values() for file in x.get("files", [])}
    return Found(samples, [x for x in old_files if is_inside(x) and x not in own], stale)


def remove_stale(folder: Path, found: Found, shards: Shards) -> None:
    """Remove journals and manifest of other settings, once their files are gone.

    Where another rank writes, its new journal may stand by now: that place is left to it. What no rank
    writes is left to rank 0, which always has samples, so that there is no new manifest before.
    """
    own = JOURNAL.format(shards.rank)
    written = {JOURNAL.format(rank) for rank in range(shards.world_size)}
    for path in found.stale:
        if path.name == own or (shards.rank == 0 and path.name not in written):
            path.unlink(missing_ok=True)


def merge(folder: Path, settings: Mapping[str, Any], shards: Shards) -> bool:
    """Write the manifest if all samples are there; return whether it stands then."""
    journals: list[_Progress] = []
    for path in _progress_files(folder):
        with contextlib.suppress(
            OSError, ValueError
        ):  # merged this very moment; or of an older set
            if path.name != MANIFEST:
                journals.append(_read(path))
    # After the journals: where one has gone, the manifest stands.
    manifest: list[_Progress] = []
    with contextlib.suppress(OSError, ValueError):
        manifest.append(_read(folder / MANIFEST))

    def ours(progress: _Progress) -> bool:
        return not differences(_settings(progress, settings), settings)

    journals, manifest = [x for x in journals if ours(x)], [x for x in manifest if ours(x)]
    current = {x.header["rank"]: x for x in journals if x.header["world_size"] == shards.world_size}
    samples: dict[str, Record] = {}
    for progress in [*manifest, *journals]:
        samples |= progress.samples
    for rank, progress in current.items():  # each rank knows its own samples best
        if any(name not in progress.samples for name in progress.header["redo"]):
            return False
        samples |= {k: x for k, x in progress.samples.items() if shards.owner.get(k) == rank}
    if any(name not in samples for name in shards.owner):
        return False
    described = current[min(current)] if current else manifest[0] if manifest else journals[0]
    write_json(
        folder / MANIFEST,
        {
            **{
                k: x for k, x in described.header.items() if k not in ("world_size", "rank", "redo")
            },
            "shards": shards.world_size if current else described.header.get("shards", 1),
            "samples": {name: samples[name] for name in shards.owner},
        },
    )
    for path in _progress_files(folder):
        if path.name != MANIFEST:
            path.unlink(missing_ok=True)
    _sweep(folder)
    return True


def finished(folder: Path, like: Mapping[str, Any]) -> int:
    """Return how many samples the journals list whose first line has these values."""
    names: set[str] = set()
    for path in folder.glob(JOURNAL.format("*")):
        with contextlib.suppress(OSError, ValueError):  # merged, or begun, this very moment
            progress = _read(path)
            if not differences(_settings(progress, like), like):
                names |= progress.samples.keys()
    return len(names)


def _progress_files(folder: Path) -> list[Path]:
    journals = sorted(folder.glob(JOURNAL.format("*")))
    manifest = folder / MANIFEST  # after the journals: where one has gone, it stands
    return [*([manifest] if manifest.is_file() else []), *journals]


def _read_all(folder: Path) -> dict[Path, _Progress | ValueError]:
    """Return the content of each journal and of the manifest, or what is wrong with them."""
    found: dict[Path, _Progress | ValueError] = {}
    for _ in range(_ATTEMPTS):
        found, paths = {}, _progress_files(folder)
        for path in paths:
            try:
                found[path] = _read(path)
            except FileNotFoundError:  # merged this very moment: the manifest has its samples
                continue
            except ValueError as error:
                found[path] = error
        if len(found) == len(paths):
            break
    return found


def _settings(progress: _Progress, like: Mapping[str, Any]) -> dict[str, Any]:
    return {key: progress.header.get(key) for key in like}


def _read(path: Path) -> _Progress:
    """Read one; raise FileNotFoundError, or ValueError if it is damaged."""
    if path.name == MANIFEST:
        header = read_manifest(path.parent)
        return _Progress(header, header.pop("samples"))
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    samples: dict[str, Record] = {}
    header = {}
    for number, line in enumerate(lines[:-1]):  # what comes after the last line break was cut off
        try:
            entry = json.loads(line)
            if number == 0:
                header = dict(entry)
                if header["format_version"] != FORMAT_VERSION:
                    raise ValueError(f"format_version={header['format_version']!r}")
                int(header["world_size"]), int(header["rank"]), list(header["redo"])
                continue
            samples[entry.pop("id")] = entry
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == 0:
                raise ValueError(
                    f"{path}: not a journal of format {FORMAT_VERSION} ({error})"
                ) from None
            break  # a disk that lost power; what follows is made again
    if not header:
        raise ValueError(f"{path}: empty")
    return _Progress(header, samples)


def _sweep(folder: Path) -> None:
    """Remove half-written samples of killed runs; all samples are complete now, so nobody writes one."""
    for place in (folder, folder / VBENCH_FOLDER):
        for path in place.glob(".tmp-*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.suffix in (".png", ".mp4"):
                path.unlink(missing_ok=True)


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"
