"""Training checkpoints: folders that are complete or do not count, whenever the process is killed.

A checkpoint is made in a hidden folder beside its place. Its files are synced to the disk one by one, the manifest
with their sizes and hashes last; then the folder is renamed. Older checkpoints go only after that.
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
    """A checkpoint whose files are all there and unchanged."""

    path: Path
    step: int
    state: dict[str, Any]
    """Plain values: counters, numbers of the optimiser, settings."""
    files: tuple[str, ...]

    def reader(self, group: str) -> ShardReader:
        """Open the tensors of a group, such as "weights"; none if the checkpoint has no such group.

        Raises:
            ValueError: parts of a tensor are missing.
        """
        names = [x for x in self.files if re.fullmatch(rf"{group}-\d+-of-\d+\.safetensors", x)]
        return ShardReader([self.path / x for x in sorted(names)])


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is."""
    return folder / f"checkpoint-{step}"


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return step and folder of all checkpoints, valid or not, by step."""
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
    """Write the checkpoint of a step, then remove the oldest ones beyond `limit`.

    Every process calls it. Each writes the rows of sharded tensors that it holds; the first one writes the rest.

    Args:
        folder: output folder of the run, which holds the checkpoints.
        step: finished optimiser steps.
        groups: tensors by name, by the name of their group ("weights", "optimizer", "ema").
        state: plain values for JSON.
        processes: the processes of the run. Default: this one alone.
        limit: checkpoints to keep, >= 1. Default: all.

    Returns:
        The folder of the checkpoint.

    Raises:
        RuntimeError: it could not be written, in every process. Earlier checkpoints are as they were.
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
            shutil.rmtree(staging, ignore_errors=True)  # a full disk needs the space
        reason = error.strerror or str(error)
        raise RuntimeError(
            f"{target}: this checkpoint could not be written ({reason}); earlier ones are unharmed, and the run can go "
            "on from the last of them (resume_from_checkpoint='latest')"
        ) from error
    processes.main_only(lambda: prune(folder, limit, keep=target))
    return target


def _begin(staging: Path) -> None:
    _tidy(staging.parent)  # its space may be needed
    staging.mkdir()


def _tidy(folder: Path) -> None:
    """Remove what killed processes left."""
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
            path.chmod(0o644)  # safetensors writes files that only their owner can read
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
    if target.exists():  # a damaged one, or the same step of an earlier attempt
        _remove(target)
    os.replace(staging, target)
    sync(target.parent)


def _write_json(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    return _synced(path)


def _synced(path: Path) -> dict[str, Any]:
    """Bring a file to the disk; return its size and hash."""
    sync(path)
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prune(folder: Path, limit: int | None, *, keep: Path) -> None:
    """Remove the oldest checkpoints beyond `limit`, damaged ones first, and what killed processes left.

    Args:
        limit: checkpoints that stay, >= 1; None: all.
        keep: the checkpoint that was just written or read; it always stays.
    """
    _tidy(folder)
    if limit is None:
        return
    others = [x for _, x in checkpoints(folder) if x != keep]
    # Damaged ones first: they must not push out one that can be used.
    others.sort(key=lambda x: not isinstance(_manifest(x), str))
    for path in others[: max(0, len(others) + 1 - limit)]:
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint; it loses its name first, so that no half of it is left under that name."""
    hidden = path.with_name(f"{_REMOVED}{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """Return a checkpoint after reading and hashing all of its files.

    Raises:
        ValueError: it is incomplete, damaged, or of another format; the message says what is wrong.
    """
    manifest = _manifest(path)
    if isinstance(manifest, str):
        raise ValueError(manifest)
    for name, about in manifest["files"].items():
        if _sha256(path / name) != about["sha256"]:
            raise ValueError(f"{name} was changed or damaged (sha256 does not match)")
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    return Checkpoint(path, manifest["step"], state, tuple(manifest["files"]))


def _manifest(path: Path) -> dict[str, Any] | str:
    """Return the manifest of a folder whose files have the right sizes; else what is wrong."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format_version"], manifest["files"]
        if version != FORMAT_VERSION:
            return f"format_version={version!r}; this dit_accel reads {FORMAT_VERSION}"
        if STATE not in files or type(manifest["step"]) is not int:
            return f"{MANIFEST} is incomplete"
        for name, about in files.items():
            if Path(name).name != name:
                return f"{MANIFEST} names {name!r}; accepted are files beside it"
            if not (path / name).is_file():
                return f"{name} is missing"
            if (size := (path / name).stat().st_size) != about["size"]:
                return f"{name} has {size} of {about['size']} bytes"
    except FileNotFoundError:
        return f"no {MANIFEST}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is not readable ({error})"
    return manifest


def find_latest(
    folder: Path, note: Callable[[str], object] = lambda _: None
) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest valid checkpoint of a run, and why newer ones were skipped.

    Args:
        note: called with a line for each checkpoint that is skipped.

    Returns:
        The checkpoint, or None if there is no valid one; and the lines.
    """
    skipped: list[str] = []
    for _, path in reversed(checkpoints(folder) if folder.is_dir() else []):
        try:
            return read_checkpoint(path), skipped
        except (ValueError, OSError) as error:
            skipped.append(f"{path.name}: {error}")
            note(f"skipped {skipped[-1]}")
    return None, skipped
