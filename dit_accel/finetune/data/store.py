"""`PrecomputedSamples`: read a folder of latents and text embeddings, and check its integrity."""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dit_accel.finetune.data.captions import some
from dit_accel.finetune.data.manifest import (
    JOURNAL,
    MANIFEST,
    Contents,
    key_of,
    read_manifest,
)
from dit_accel.finetune.data.model_identity import model_differences, model_label
from dit_accel.finetune.data.samples import Sample, Samples

_REPAIR = "run the command that made the folder again to make the missing samples"
_MOST_OPEN = 128
"""Largest number of open shards. Operating systems limit the number of open files per process."""


class PrecomputedSamples(Samples):
    """Memory-mapped samples of a precomputed folder.

    `open_store` checks the sizes of the shards and the names and shapes of their tensors. The hash of a shard is
    checked when it is first read.

    Args:
        folder: the precomputed folder.
        contents: contents of its manifest, checked by `open_store`.
    """

    def __init__(self, folder: Path, contents: Contents) -> None:
        self.folder = folder
        self.contents = contents
        self.ids: Sequence[str] = list(contents.samples)
        self.buckets: Sequence[str] = [x["bucket"] for x in contents.samples.values()]
        # A thread may read the next batch while the main thread reads the current one.
        self._lock = threading.Lock()
        self._intact: set[str] = set()
        self._opened: OrderedDict[str, Any] = OrderedDict()

    def sample(self, index: int) -> Sample:
        """Return one sample. Its tensors are views of the file.

        Raises:
            ValueError: if the shard is damaged.
        """
        id_ = self.ids[index]
        record = self.contents.samples[id_]
        with self._lock:
            shard = self._shard(record["shard"])
        tensors = {name: shard.get_tensor(key_of(name, id_)) for name in record["shapes"]}
        return tensors.pop("latents"), tensors

    def _shard(self, name: str) -> Any:
        if name in self._opened:
            self._opened.move_to_end(name)
            return self._opened[name]
        path = self.folder / name
        if name not in self._intact:
            _check_hash(path, self.contents.shards[name]["sha256"])
            self._intact.add(name)
        self._opened[name] = safe_open(path, framework="pt")
        if len(self._opened) > _MOST_OPEN:
            self._opened.popitem(last=False)
        return self._opened[name]


def open_store(
    folder: str | os.PathLike,
    *,
    model: Mapping[str, Any] | None = None,
    argument: str = "precomputed_dir",
) -> PrecomputedSamples:
    """Open a precomputed folder.

    Args:
        folder: folder made by `dit-accel precompute`.
        model: identity of the model that will be trained (`model_identity`). Default: do not compare.
        argument: name of the option for `folder`, for messages.

    Raises:
        ValueError: if the folder is missing, incomplete, of another format version or made with another model; or if
            a shard or tensor is missing, truncated or of another shape.
    """
    root = Path(folder)
    where = f"{argument}={str(folder)!r}"
    contents = read_manifest(root)
    if contents is None:
        if (root / JOURNAL).exists():
            raise ValueError(f"{where}: the folder is incomplete; {_REPAIR}")
        raise ValueError(
            f"{where}: has no {MANIFEST}; expected a folder made by dit-accel precompute"
        )
    if not contents.samples:
        raise ValueError(f"{where}: holds no samples")
    different = [] if model is None else model_differences(contents.model, model)
    if model is not None and different:
        raise ValueError(
            f"{where}: made with another model ({model_label(contents.model)}, not {model_label(model)}): "
            f"{'; '.join(different)}"
        )
    for name, record in contents.shards.items():
        problem = shard_problem(root / name, record)
        if problem is not None:
            raise ValueError(f"{root / name}: {problem}; {_REPAIR}")
    _check_tensors(root, contents)
    return PrecomputedSamples(root, contents)


def shard_problem(path: Path, record: Mapping[str, Any]) -> str | None:
    """Return a message if a shard is missing or has another size than in the manifest, otherwise None."""
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if size == record["bytes"]:
        return None
    return f"{'truncated' if size < record['bytes'] else 'changed'} ({size} of {record['bytes']} bytes)"


def _check_hash(path: Path, expected: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); {_REPAIR}") from None
    if found != expected:
        raise ValueError(
            f"{path}: damaged (sha256 is {found[:12]}..., expected {expected[:12]}...); delete it and {_REPAIR}"
        )


def _check_tensors(root: Path, contents: Contents) -> None:
    """Check in the headers of the shards that each sample has all of its tensors."""
    by_shard: dict[str, list[str]] = {}
    for id_, record in contents.samples.items():
        by_shard.setdefault(record["shard"], []).append(id_)
    for name, ids in by_shard.items():
        try:
            shard = safe_open(root / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{root / name}: not a readable safetensors file ({error}); {_REPAIR}"
            ) from None
        with shard:
            keys = set(shard.keys())
            for id_ in ids:
                shapes = contents.samples[id_]["shapes"]
                missing = [x for x in shapes if key_of(x, id_) not in keys]
                if missing:
                    raise ValueError(
                        f"{root / name}: sample {id_!r} has no {some(missing)}; delete the file and {_REPAIR}"
                    )
                for tensor, shape in shapes.items():
                    found = shard.get_slice(key_of(tensor, id_)).get_shape()
                    if list(found) != list(shape):
                        raise ValueError(
                            f"{root / name}: {tensor} of sample {id_!r} have the shape {list(found)}, expected "
                            f"{list(shape)}; delete the file and {_REPAIR}"
                        )
