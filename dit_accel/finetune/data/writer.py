"""`store_writer`: write a precomputed folder. A kill at any moment loses at most one shard."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_accel.environment import versions
from dit_accel.files import atomic_path, naming_failures, sync, write_json
from dit_accel.finetune.data.captions import some
from dit_accel.finetune.data.manifest import (
    FORMAT_VERSION,
    JOURNAL,
    LOCK,
    MANIFEST,
    Contents,
    Record,
    is_shard,
    journal_line,
    key_of,
    shard_name,
    shard_number,
)
from dit_accel.finetune.data.progress import Sources, kept_contents
from dit_accel.finetune.data.samples import Sample

SHARD_SAMPLES = 64
SHARD_BYTES = 256 << 20
SHARD_SECONDS = 120.0
"""Limits of a shard. It is written when it reaches this number of samples or bytes, or this age."""
_ADVICE = "finished samples are kept; run the command again to continue"


class StoreWriter:
    """Writer that adds samples to a precomputed folder. Create it with `store_writer`.

    A shard is complete on the disk before the journal lists it. The manifest is written last.
    """

    def __init__(self, folder: Path, contents: Contents, shard_samples: int) -> None:
        self._folder, self._contents, self._shard_samples = folder, contents, shard_samples
        self._pending: dict[str, tuple[Record, dict[str, Tensor]]] = {}
        self._number = 1 + max(map(shard_number, contents.shards), default=-1)
        self._begun = False
        self._since = time.monotonic()

    @property
    def done(self) -> Mapping[str, Record]:
        """Records of the samples on the disk, by id."""
        return self._contents.samples

    def add(self, id_: str, bucket: str, sample: Sample, source: Mapping[str, Any]) -> None:
        """Add a sample. It is written to the disk when its shard is full, or by `flush`.

        Args:
            id_: unique name of the sample.
            bucket: bucket of the sample, such as "33x64x64".
            sample: latents, and conditions without batch dimension.
            source: description of the source of the sample, as plain values.

        Raises:
            ValueError: if the latents are not finite.
            RuntimeError: if a shard could not be written.
        """
        latents, conditions = sample
        if not latents.isfinite().all():
            raise ValueError(f"{id_}: its latents are not finite; the model may need another dtype")
        tensors = {"latents": latents.float(), **conditions}
        # Copy, because a view of one row would keep the whole batch in memory.
        tensors = {k: x.detach().to("cpu", copy=True).contiguous() for k, x in tensors.items()}
        if not self._pending:
            self._since = time.monotonic()
        self._pending[id_] = {"bucket": bucket, "source": dict(source)}, tensors
        held = sum(x.nbytes for _, own in self._pending.values() for x in own.values())
        old = time.monotonic() - self._since >= SHARD_SECONDS
        if len(self._pending) >= self._shard_samples or held >= SHARD_BYTES or old:
            self.flush()

    def flush(self) -> None:
        """Write all pending samples to a shard.

        Raises:
            RuntimeError: if the shard could not be written.
        """
        if not self._pending:
            return
        from safetensors.torch import save

        name = shard_name(self._number)
        tensors: dict[str, Tensor] = {}
        samples: dict[str, Record] = {}
        for id_, (record, own) in self._pending.items():
            tensors |= {key_of(k, id_): x for k, x in own.items()}
            shapes = {k: list(x.shape) for k, x in own.items()}
            samples[id_] = {**record, "shard": name, "shapes": shapes}
        data = save(tensors)
        shard = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        with naming_failures(_ADVICE):
            self._begin()
            with atomic_path(self._folder / name) as temporary:
                temporary.write_bytes(data)
            sync(self._folder)
            _append(self._folder / JOURNAL, journal_line(name, shard, samples))
        self._contents.shards[name] = shard
        self._contents.samples.update(samples)
        self._pending, self._number = {}, self._number + 1

    def finish(self, ids: Sequence[str], broken: Mapping[str, str] | None = None) -> None:
        """Write the manifest, unless it is already up to date.

        Args:
            ids: names of all samples, in the order in which readers return them.
            broken: error message of each skipped file, by id.

        Raises:
            RuntimeError: if a sample is missing, or if the manifest could not be written.
        """
        self.flush()
        missing = [x for x in ids if x not in self.done]
        if missing:
            raise RuntimeError(f"{self._folder}: missing samples: {some(missing)}")
        broken, old = dict(broken or {}), self._contents
        journal = self._folder / JOURNAL
        same = list(old.samples) == list(ids) and old.broken == broken
        if same and not journal.exists() and (self._folder / MANIFEST).exists():
            return
        samples = {x: self.done[x] for x in ids}
        manifest = {**old.header, "shards": old.shards, "samples": samples, "broken": broken}
        with naming_failures(_ADVICE):
            write_json(self._folder / MANIFEST, manifest)
            sync(self._folder)
            journal.unlink(missing_ok=True)

    def _begin(self) -> None:
        """Write the journal with all existing shards before the first new shard."""
        if self._begun:
            return
        by_shard: dict[str, dict[str, Record]] = {x: {} for x in self._contents.shards}
        for id_, record in self._contents.samples.items():
            by_shard[record["shard"]][id_] = record
        lines = [json.dumps(self._contents.header, ensure_ascii=False) + "\n"]
        lines += [journal_line(k, self._contents.shards[k], own) for k, own in by_shard.items()]
        with atomic_path(self._folder / JOURNAL) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
        sync(self._folder)
        self._begun = True


@contextlib.contextmanager
def store_writer(
    folder: str | os.PathLike,
    *,
    settings: Mapping[str, Any],
    model: Mapping[str, Any],
    sources: Sources,
    overwrite: bool = False,
    shard_samples: int = SHARD_SAMPLES,
    wait: bool = False,
    argument: str = "output_dir",
) -> Iterator[StoreWriter]:
    """Open a precomputed folder for writing. Existing samples are kept.

    If the block raises an error, the samples added so far are written.

    Args:
        folder: a new or empty folder, or a precomputed folder, complete or not.
        settings: settings with which samples are made, as plain values.
        model: identity of the model (`model_identity`).
        sources: source of each sample, by id.
        overwrite: replace samples of other settings, models or sources.
        shard_samples: largest number of samples in a shard.
        wait: wait if another process writes to the folder. Default: raise an error.
        argument: name of the option for `folder`, for messages.

    Raises:
        ValueError: if the folder holds unrelated files, or samples of other settings, models or sources.
        RuntimeError: if another process writes to the folder, or if a file could not be written.
    """
    root = Path(folder)
    with _locked(root, argument, wait=wait):
        kept = kept_contents(
            root,
            settings=settings,
            sources=sources,
            model=model,
            overwrite=overwrite,
            argument=argument,
        )
        with naming_failures(_ADVICE):
            _sweep(root, kept)
        if kept is None:
            header = {"format_version": FORMAT_VERSION, "model": dict(model)}
            kept = Contents({**header, "settings": dict(settings), "versions": versions()})
        writer = StoreWriter(root, kept, shard_samples)
        try:
            yield writer
        except BaseException:
            with contextlib.suppress(RuntimeError):
                writer.flush()
            raise


def _append(path: Path, line: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _sweep(folder: Path, kept: Contents | None) -> None:
    """Remove the shards that are not kept, and incomplete files of killed runs."""
    if kept is None:
        for name in (MANIFEST, JOURNAL):
            (folder / name).unlink(missing_ok=True)
    for path in sorted(folder.iterdir()):
        orphan = is_shard(path.name) and (kept is None or path.name not in kept.shards)
        if (orphan or path.name.startswith(".tmp-")) and path.is_file():
            path.unlink()


@contextlib.contextmanager
def _locked(folder: Path, argument: str, *, wait: bool) -> Iterator[None]:
    """Lock the folder against other writers. The lock of a killed process is released by the system."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise RuntimeError(
            f"{argument}={str(folder)!r}: another process is writing to this folder; wait for it, or use another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()
