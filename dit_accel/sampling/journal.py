"""Progress of a sample set on disk: one journal per rank during the run, one manifest at the end.

Ranks communicate through the folder only. A rank appends a line to its journal when the files of a sample are complete.
When a rank has finished and the journals together list every sample, it merges them into the manifest. If two ranks finish
at the same time, both merge and write the same manifest. Journals are removed after the manifest is written. Journals and
manifests of other settings are removed after the files that they list, each by one rank only.
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
"""Number of attempts to read the journals while other ranks merge them."""


@dataclass(frozen=True)
class Shards:
    """Assignment of samples to the ranks of a run."""

    owner: dict[str, int]
    """Rank of each sample by id, in the order of the manifest."""
    rank: int
    world_size: int


@dataclass(frozen=True)
class _Progress:
    """Content of one journal or manifest."""

    header: dict[str, Any]
    samples: dict[str, Record]


@dataclass(frozen=True)
class EarlierRuns:
    """Samples and files of earlier runs in a folder."""

    samples: dict[str, Record] | None
    """Samples with the same settings. None: no run with these settings has started."""
    old_files: list[str]
    """Files of samples with other settings, without files that also belong to `samples`."""
    stale: list[Path]
    """Journals and manifest that list none of `samples`."""


class Journal:
    """Journal of one rank, with one line for each finished sample."""

    def __init__(
        self,
        folder: Path,
        shards: Shards,
        header: dict[str, Any],
        samples: Mapping[str, Record],
        redo: Iterable[str] = (),
    ) -> None:
        """Write the file with the samples that exist already.

        Args:
            folder: folder of the sample set.
            shards: assignment of samples to ranks.
            header: settings and environment of the run.
            samples: samples that exist already, by id.
            redo: ids of damaged samples, which other journals may still list as finished.
        """
        self._path = folder / JOURNAL.format(shards.rank)
        first = header | {"world_size": shards.world_size, "rank": shards.rank, "redo": [*redo]}
        lines = [first, *({"id": name} | record for name, record in samples.items())]
        with atomic_path(self._path) as temporary:
            temporary.write_text("".join(map(_line, lines)), encoding="utf-8")
        self._file = self._path.open("a", encoding="utf-8")

    def append(self, name: str, record: Record) -> None:
        """Append a sample whose files are complete, and flush the line to disk."""
        self._file.write(_line({"id": name} | record))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def known_samples(folder: Path, settings: Mapping[str, Any], *, overwrite: bool) -> EarlierRuns:
    """Return the samples of earlier runs with these settings, and the files of runs with other settings.

    Raises:
        ValueError: there are samples with other settings or damaged files, and `overwrite` is False.
    """
    samples: dict[str, Record] | None = None
    old_files: list[str] = []
    stale: list[Path] = []
    for path, progress in _read_all(folder).items():
        if isinstance(progress, ValueError):
            if not overwrite:
                raise ValueError(f"{progress}; set overwrite, or choose another folder")
            stale.append(path)
        elif different := differences(_settings(progress, settings), settings):
            if not overwrite:
                raise ValueError(
                    f"output_dir={str(folder)!r}: contains samples with other settings: {'; '.join(different[:6])}; "
                    "set overwrite, or choose another folder"
                )
            old_files += [file for x in progress.samples.values() for file in x.get("files", [])]
            stale.append(path)
        else:
            samples = (samples or {}) | progress.samples
    # The old journal of a rank that has not started yet can list files that this run has already replaced.
    own = {file for x in (samples or {}).values() for file in x.get("files", [])}
    return EarlierRuns(samples, [x for x in old_files if is_inside(x) and x not in own], stale)


def remove_stale(folder: Path, found: EarlierRuns, shards: Shards) -> None:
    """Remove journals and the manifest of other settings, after their files were removed.

    Each rank removes its own old journal only, because another rank may already have written a new one. Rank 0 removes
    the manifest and journals of ranks that this run does not have. Rank 0 always has samples, so no new manifest can
    exist before it does so.
    """
    own = JOURNAL.format(shards.rank)
    written = {JOURNAL.format(rank) for rank in range(shards.world_size)}
    for path in found.stale:
        if path.name == own or (shards.rank == 0 and path.name not in written):
            path.unlink(missing_ok=True)


def merge(folder: Path, settings: Mapping[str, Any], shards: Shards) -> bool:
    """Write the manifest and remove the journals if all samples are finished. Return whether they are."""
    journals: list[_Progress] = []
    for path in _progress_files(folder):
        with contextlib.suppress(
            OSError, ValueError
        ):  # another rank has just merged it, or it is damaged
            if path.name != MANIFEST:
                journals.append(_read(path))
    # Read after the journals: if a journal was removed meanwhile, the manifest exists.
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
    for rank, progress in current.items():  # the journal of a rank is newest for its own samples
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
    """Return the number of samples in the journals whose header has the values of `like`."""
    names: set[str] = set()
    for path in folder.glob(JOURNAL.format("*")):
        with contextlib.suppress(OSError, ValueError):  # merged or being written at this moment
            progress = _read(path)
            if not differences(_settings(progress, like), like):
                names |= progress.samples.keys()
    return len(names)


def _progress_files(folder: Path) -> list[Path]:
    """Return the manifest, if it exists, and the journals."""
    journals = sorted(folder.glob(JOURNAL.format("*")))
    manifest = (
        folder / MANIFEST
    )  # listed after the journals: if one was removed meanwhile, the manifest exists
    return [*([manifest] if manifest.is_file() else []), *journals]


def _read_all(folder: Path) -> dict[Path, _Progress | ValueError]:
    """Return the content of each journal and of the manifest, or the error of a damaged file."""
    found: dict[Path, _Progress | ValueError] = {}
    for _ in range(_ATTEMPTS):
        found, paths = {}, _progress_files(folder)
        for path in paths:
            try:
                found[path] = _read(path)
            except (
                FileNotFoundError
            ):  # merged at this moment: read again, the manifest has its samples
                continue
            except ValueError as error:
                found[path] = error
        if len(found) == len(paths):
            break
    return found


def _settings(progress: _Progress, like: Mapping[str, Any]) -> dict[str, Any]:
    """Return the header values of the keys of `like`."""
    return {key: progress.header.get(key) for key in like}


def _read(path: Path) -> _Progress:
    """Return the content of a journal or of the manifest.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged.
    """
    if path.name == MANIFEST:
        header = read_manifest(path.parent)
        return _Progress(header, header.pop("samples"))
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    samples: dict[str, Record] = {}
    header = {}
    for number, line in enumerate(lines[:-1]):  # an incomplete last line is ignored
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
            break  # damaged by a power loss; the samples after it are generated again
    if not header:
        raise ValueError(f"{path}: empty file")
    return _Progress(header, samples)


def _sweep(folder: Path) -> None:
    """Remove temporary files of killed runs. All samples are complete, so no process uses them."""
    for place in (folder, folder / VBENCH_FOLDER):
        for path in place.glob(".tmp-*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.suffix in (".png", ".mp4"):
                path.unlink(missing_ok=True)


def _line(entry: Mapping[str, Any]) -> str:
    """Return an entry as a line of JSON."""
    return json.dumps(entry, ensure_ascii=False) + "\n"
