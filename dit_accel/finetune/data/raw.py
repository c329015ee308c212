"""`RawSamples`: decode and encode files during training."""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
from torch import Tensor

from dit_accel.finetune.data.encode import Encoder, encode_captions, encode_latents
from dit_accel.finetune.data.samples import Sample, Samples
from dit_accel.finetune.data.sources import Source, read_clip

CACHE_BYTES = 1 << 30
"""Size of the cache for encoded samples. A data set that fits is encoded only once."""
K = TypeVar("K")


class RawSamples(Samples):
    """Files of a folder, encoded on demand.

    Each sample is encoded on its own, so that it does not depend on the other samples of its batch.

    Args:
        sources: files and their buckets, from `find_sources`.
        trainable: the model.
        fps: frame rate to which videos are resampled. None keeps the frames of each file.
        workers: number of files that are decoded in parallel.
        cache_bytes: size of the cache for encoded samples.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        trainable: Encoder,
        *,
        fps: float | int | None,
        workers: int = 4,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.buckets: Sequence[str] = [str(x.bucket) for x in sources]
        self.ids: Sequence[str] = [x.item.id for x in sources]
        self._sources, self._trainable, self._fps = sources, trainable, fps
        self._pool = ThreadPoolExecutor(workers, "decode")
        self._decoding: dict[int, Future[np.ndarray]] = {}
        self._latents: _Cache[int] = _Cache(cache_bytes // 2)
        self._conditions: _Cache[str] = _Cache(cache_bytes // 2)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Start decoding samples in the background."""
        for i in indices:
            if i not in self._latents and i not in self._decoding:
                self._decoding[i] = self._pool.submit(read_clip, self._sources[i], self._fps)

    def sample(self, index: int) -> Sample:
        """Return one sample, from the cache if possible.

        Raises:
            ValueError: if the file cannot be decoded, or if its latents are not finite.
        """
        source = self._sources[index]
        latents = self._latents.get(index)
        if latents is None:
            self.prefetch([index])
            (x,) = encode_latents(self._trainable, [self._decoding.pop(index).result()])
            if not x.isfinite().all():
                raise ValueError(
                    f"{source.item.path}: its latents are not finite; are the weights of the VAE damaged?"
                )
            latents = self._latents.put(index, {"latents": x})
        conditions = self._conditions.get(source.item.caption)
        if conditions is None:
            (encoded,) = encode_captions(self._trainable, [source.item.caption])
            conditions = self._conditions.put(source.item.caption, encoded)
        return latents["latents"], dict(conditions)


class _Cache(Generic[K]):
    """Least-recently-used cache of tensors with a limit in bytes."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self._entries: OrderedDict[K, dict[str, Tensor]] = OrderedDict()

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def get(self, key: K) -> dict[str, Tensor] | None:
        """Return the tensors of a key, or None if they are not in the cache."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: K, value: dict[str, Tensor]) -> dict[str, Tensor]:
        """Store tensors, remove the least recently used ones beyond the limit, and return the tensors."""
        self._entries[key] = value
        self._held += _size(value)
        while self._held > self._most and self._entries:
            self._held -= _size(self._entries.popitem(last=False)[1])
        return value


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(x.nbytes for x in tensors.values())
