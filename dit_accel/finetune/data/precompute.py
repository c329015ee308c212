"""`precompute`: encode a data set once into a folder that training reads."""

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel.finetune.data.buckets import Bucket
from dit_accel.finetune.data.encode import Encoder, encode_clips, size_rules
from dit_accel.finetune.data.model_identity import model_identity
from dit_accel.finetune.data.reader import BrokenFileError
from dit_accel.finetune.data.sources import SizeChoice, Source, read_clip
from dit_accel.finetune.data.writer import SHARD_SAMPLES, store_writer


@dataclass(frozen=True)
class Precomputed:
    """Result of `precompute`."""

    folder: Path
    """The precomputed folder."""
    samples: int
    """Number of samples in the folder."""
    made: int
    """Number of samples that this run encoded. Earlier runs encoded all others."""
    buckets: dict[str, int]
    """Number of samples by bucket."""
    broken: dict[str, str]
    """Error message for each file that was skipped, by id."""


def precompute(
    trainable: Encoder,
    sources: Sequence[Source],
    sizes: SizeChoice,
    output_dir: str | os.PathLike,
    *,
    batch_size: int = 1,
    workers: int = 4,
    skip_broken: bool = False,
    broken: Mapping[str, str] | None = None,
    overwrite: bool = False,
    shard_samples: int = SHARD_SAMPLES,
    progress: bool = False,
) -> Precomputed:
    """Encode the files that are not encoded yet. A call after a kill continues with the missing files.

    Args:
        trainable: the model.
        sources: files and their buckets, from `find_sources`.
        sizes: settings from which the buckets were chosen.
        output_dir: a new or empty folder, or a folder of an earlier run with the same options.
        batch_size: number of clips that the model encodes at once.
        workers: number of files that are decoded in parallel while the model encodes.
        skip_broken: skip files that cannot be decoded. Default: raise an error.
        broken: files that `find_sources` skipped, for the manifest.
        overwrite: replace samples that were made with other options, from other files or with another model.
        shard_samples: largest number of samples in a shard. A kill loses at most one shard.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: if a file cannot be decoded, or if output_dir holds other data.
        RuntimeError: if the memory does not suffice, if another process writes to the folder, or if a write failed.
    """
    from tqdm import tqdm

    for bucket in {x.bucket for x in sources}:
        size_rules(trainable).check(bucket)
    records = {x.item.id: source_record(x) for x in sources}
    left_out = dict(broken or {})
    with store_writer(
        output_dir,
        settings=data_settings(trainable, sizes),
        model=model_identity(trainable.pipe),
        sources=records,
        overwrite=overwrite,
        shard_samples=shard_samples,
    ) as writer:
        missing = [x for x in sources if x.item.id not in writer.done]
        kept = len(sources) - len(missing)
        bar = tqdm(
            total=len(sources), initial=kept, desc="encoding", disable=not progress, unit="sample"
        )
        with bar:
            for batch in _decoded(missing, sizes.fps, batch_size, workers):
                clips: list[np.ndarray] = []
                intact: list[Source] = []
                for source, clip in batch:
                    if isinstance(clip, BrokenFileError):
                        if not skip_broken:
                            raise BrokenFileError(f"{clip}; use --skip-broken to skip such files")
                        left_out[source.item.id] = str(clip)
                    else:
                        clips.append(clip)
                        intact.append(source)
                if intact:
                    samples = encode_clips(trainable, clips, [x.item.caption for x in intact])
                    for source, sample in zip(intact, samples, strict=True):
                        id_ = source.item.id
                        writer.add(id_, str(source.bucket), sample, records[id_])
                bar.update(len(batch))
        ids = [x.item.id for x in sources if x.item.id not in left_out]
        if not ids:
            raise ValueError(
                f"none of the {len(sources)} files could be decoded: {next(iter(left_out.values()))}"
            )
        writer.finish(ids, left_out)
    found: dict[str, int] = {}
    for source in sources:
        if source.item.id not in left_out:
            found[str(source.bucket)] = found.get(str(source.bucket), 0) + 1
    return Precomputed(Path(output_dir), len(ids), len(ids) - kept, found, left_out)


def data_settings(trainable: Encoder, sizes: SizeChoice) -> dict[str, Any]:
    """Return the settings that affect how files are encoded, as plain values."""
    tokens = getattr(trainable, "text_tokens", None)
    return {"made_from": "files", **sizes.settings(), "max_sequence_length": tokens}


def source_record(source: Source) -> dict[str, Any]:
    """Return a description of the source of a sample, as plain values."""
    item = source.item
    return {
        "bytes": item.path.stat().st_size,
        "caption": item.caption,
        "start": item.start,
        "end": item.end,
    }


def _decoded(
    sources: Sequence[Source], fps: float | int | None, batch_size: int, workers: int
) -> Iterator[list[tuple[Source, np.ndarray | BrokenFileError]]]:
    """Yield decoded batches, each of one bucket. Threads decode ahead (PyAV and torch release the GIL)."""
    batches = list(_batches(sources, batch_size))
    waiting: deque[Future[Any]] = deque()
    queue = iter([x for batch in batches for x in batch])
    with ThreadPoolExecutor(workers) as pool:
        try:
            for batch in batches:
                result = []
                for source in batch:
                    # Limit the decoded clips in memory to one batch plus one clip per worker.
                    while len(waiting) < batch_size + workers:
                        following = next(queue, None)
                        if following is None:
                            break
                        waiting.append(pool.submit(_clip_or_error, following, fps))
                    result.append((source, waiting.popleft().result()))
                yield result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _batches(sources: Sequence[Source], batch_size: int) -> Iterator[list[Source]]:
    """Yield batches, each of one bucket, with the buckets in the order of their first source."""
    groups: dict[Bucket, list[Source]] = {}
    for source in sources:
        groups.setdefault(source.bucket, []).append(source)
    for group in groups.values():
        for first in range(0, len(group), batch_size):
            yield group[first : first + batch_size]


def _clip_or_error(source: Source, fps: float | int | None) -> np.ndarray | BrokenFileError:
    try:
        return read_clip(source, fps)
    except BrokenFileError as error:
        return error
    except OSError as error:  # the file was removed, or a network file system failed
        return BrokenFileError(f"{source.item.path}: cannot be read ({error.strerror or error})")
