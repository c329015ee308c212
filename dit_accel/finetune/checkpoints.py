"""Training checkpoints that survive a kill at any moment: a checkpoint is either complete or ignored.

Files are first written to a hidden folder and synced to the disk. The manifest with their sizes and hashes is written
last. Then the folder is renamed to its final name, and only after that are older checkpoints removed.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_accel.files import sync
from dit_accel.finetune.processes import Processes
from dit_accel.finetune.shards import ShardReader, write_shard

FORMAT_VERSION = 1
MANIFEST, STATE = "manifest.json", "state.json"
_NAME = re.compile(r"checkpoint-([0-9]+)")
_STAGING, _REMOVED = ".tmp-checkpoint-", ".tmp-removed-"
_SHARD = "{}-{:05d}-of-{:05d}.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoint whose files have been verified."""

    path: Path
    """Folder of the checkpoint."""
    step: int
    """Number of finished optimiser steps."""
    state: dict[str, Any]
    """JSON values: counters, scalars of the optimiser, settings."""
    files: tuple[str, ...]
    """Names of the files in the folder."""

    def reader(self, group: str) -> ShardReader:
        """Open the tensors of a group, such as "weights". The reader is empty if the checkpoint lacks the group.

        Raises:
            ValueError: if rows of a tensor are missing.
        """
        names = [x for x in self.files if re.fullmatch(rf"{group}-\d+-of-\d+\.safetensors", x)]
        return ShardReader([self.path / x for x in sorted(names)])


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return folder / f"checkpoint-{step}"


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return step and folder of all checkpoints, valid or not, sorted by step."""
    found = [(x, _NAME.fullmatch(x.name)) for x in folder.iterdir() if x.is_dir()]
    return sorted((int(name.group(1)), x) for x, name in found if name)


def save_checkpoint(
    folder: Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor]],
    state: dict[str, Any],
    *,
    processes: Processes | None = None,
    limit: int | None = None,
) -> Path:
    """Write the checkpoint of a step, then remove the oldest checkpoints beyond `limit`.

    Every process must call this function. Each process writes its rows of sharded tensors. The main process also
    writes all other tensors.

    Args:
        folder: output folder of the run, which holds the checkpoints.
        step: number of finished optimiser steps.
        groups: tensors by group ("weights", "optimizer", "ema") and name.
        state: JSON values to store.
        processes: processes of the run. Default: a single process.
        limit: number of checkpoints to keep, >= 1. Default: keep all.

    Returns:
        The folder of the checkpoint.

    Raises:
        RuntimeError: in every process, if a file could not be written. Earlier checkpoints are unchanged.
    """
    processes = processes or Processes()
    target = checkpoint_path(folder, step)
    staging = folder / f"{_STAGING}{step}"
    try:
        processes.main_only(lambda: _begin(staging))
        shards = processes.together(lambda: _write_groups(staging, groups, processes))
        files = {name: about for shard in shards for name, about in shard.items()}
        processes.main_only(lambda: _finish(staging, target, step, state, files))
    except OSError as error:
        if processes.is_main:
            shutil.rmtree(staging, ignore_errors=True)  # free the space on a full disk
        reason = error.strerror or str(error)
        raise RuntimeError(
            f"{target}: the checkpoint could not be written ({reason}). Earlier checkpoints are unchanged; continue "
            "from the last one with resume_from_checkpoint='latest'"
        ) from error
    processes.main_only(lambda: prune(folder, limit, keep=target))
    return target


def _begin(staging: Path) -> None:
    _tidy(staging.parent)  # free the space before writing
    staging.mkdir()


def _tidy(folder: Path) -> None:
    """Remove the temporary folders that killed processes left behind."""
    for pattern in (_STAGING, _REMOVED):
        for left in folder.glob(f"{pattern}*"):
            shutil.rmtree(left, ignore_errors=True)


def _write_groups(
    staging: Path, groups: Mapping[str, Mapping[str, Tensor]], processes: Processes
) -> dict[str, dict[str, Any]]:
    written = {}
    for group, tensors in groups.items():
        path = staging / _SHARD.format(group, processes.rank, processes.count)
        if write_shard(path, tensors, rank=processes.rank):
            path.chmod(0o644)  # safetensors creates files with mode 0600
            written[path.name] = _synced(path)
    return written


def _finish(
    staging: Path,
    target: Path,
    step: int,
    state: dict[str, Any],
    files: dict[str, dict[str, Any]],
) -> None:
    files = {**files, STATE: _write_json(staging / STATE, state)}
    sync(staging)
    _write_json(
        staging / MANIFEST, {"format_version": FORMAT_VERSION, "step": step, "files": files}
    )
    sync(staging)
    if target.exists():  # a damaged checkpoint, or one of an earlier attempt
        _remove(target)
    os.replace(staging, target)
    sync(target.parent)


def _write_json(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    return _synced(path)


def _synced(path: Path) -> dict[str, Any]:
    """Sync a file to the disk, and return its size and hash."""
    sync(path)
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prune(folder: Path, limit: int | None, *, keep: Path) -> None:
    """Remove damaged checkpoints and then the oldest ones beyond `limit`, and leftovers of killed processes.

    Args:
        folder: output folder of the run.
        limit: number of checkpoints to keep, >= 1. None keeps all.
        keep: the checkpoint that was just written or read. It is never removed.
    """
    _tidy(folder)
    if limit is None:
        return
    others = [x for _, x in checkpoints(folder) if x != keep]
    # Damaged checkpoints go first, so that they do not displace a valid one.
    others.sort(key=lambda x: not isinstance(_manifest(x), str))
    for path in others[: max(0, len(others) + 1 - limit)]:
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that an interrupted removal leaves no partial checkpoint."""
    hidden = path.with_name(f"{_REMOVED}{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify the hashes of all files of a checkpoint, and return the checkpoint.

    Raises:
        ValueError: if the checkpoint is incomplete, damaged or of another format version.
    """
    manifest = _manifest(path)
    if isinstance(manifest, str):
        raise ValueError(manifest)
    for name, about in manifest["files"].items():
        if _sha256(path / name) != about["sha256"]:
            raise ValueError(f"{name} is damaged (its sha256 does not match {MANIFEST})")
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    return Checkpoint(path, manifest["step"], state, tuple(manifest["files"]))


def _manifest(path: Path) -> dict[str, Any] | str:
    """Check the manifest and the file sizes. Return the manifest, or a message that describes the problem."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format_version"], manifest["files"]
        if version != FORMAT_VERSION:
            return f"format_version={version!r}: this version of dit_accel reads {FORMAT_VERSION}"
        if STATE not in files or type(manifest["step"]) is not int:
            return f"{MANIFEST} is incomplete"
        for name, about in files.items():
            if Path(name).name != name:
                return f"{MANIFEST} names {name!r}: expected the name of a file in the same folder"
            if not (path / name).is_file():
                return f"{name} is missing"
            if (size := (path / name).stat().st_size) != about["size"]:
                return f"{name} is truncated or changed ({size} of {about['size']} bytes)"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is not readable ({error})"
    return manifest


def find_latest(
    folder: Path, note: Callable[[str], object] = lambda _: None
) -> tuple[Checkpoint | None, list[str]]:
    """Find the newest valid checkpoint of a run.

    Args:
        folder: output folder of the run.
        note: called with a message for each invalid checkpoint that is skipped.

    Returns:
        The checkpoint, or None if no checkpoint is valid, and the reasons why checkpoints were skipped.
    """
    skipped: list[str] = []
    for _, path in reversed(checkpoints(folder) if folder.is_dir() else []):
        try:
            return read_checkpoint(path), skipped
        except (ValueError, OSError) as error:
            skipped.append(f"{path.name}: {error}")
            note(f"skipped {skipped[-1]}")
    return None, skipped
