"""`Samples`: common interface of all sources of training samples. `load_batch` loads several samples as a batch."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dit_accel.finetune.batch import Batch

Sample = tuple[Tensor, dict[str, Tensor]]
"""Pair of latents `[C, (F,) H, W]` in fp32 and conditions without batch dimension."""


@runtime_checkable
class Samples(Protocol):
    """Training samples by index.

    If a subclass has a method `prefetch(indices)`, `load_batch` calls it first, so that files are read in parallel.
    """

    buckets: Sequence[str]
    """Bucket of each sample, such as "33x64x64" (frames x height x width in pixels). Samples of one bucket have
    equal shapes."""
    ids: Sequence[str]
    """Name of each sample."""

    def sample(self, index: int) -> Sample:
        """Return one sample.

        Raises:
            ValueError: if the sample cannot be read. The message names its file.
        """
        ...


def load_batch(samples: Samples, indices: Sequence[int]) -> Batch:
    """Load samples of one bucket as a batch.

    Args:
        samples: the training samples.
        indices: indices of the samples, at least one. All samples must belong to one bucket.

    Raises:
        ValueError: if there is no index, if there are several buckets, or if a sample cannot be read.
    """
    names = {samples.buckets[i] for i in indices}
    if len(names) != 1:
        raise ValueError(
            f"indices={list(indices)}: belong to the buckets {sorted(names)}; expected exactly one bucket"
        )
    if hasattr(samples, "prefetch"):
        samples.prefetch(indices)
    rows = [samples.sample(i) for i in indices]
    ids = tuple(samples.ids[i] for i in indices)
    latents = _stacked("latents", [x for x, _ in rows], ids)
    conditions = {name: _stacked(name, [x[name] for _, x in rows], ids) for name in rows[0][1]}
    return Batch(latents, conditions, ids)


def _stacked(name: str, rows: Sequence[Tensor], ids: Sequence[str]) -> Tensor:
    for row, id_ in zip(rows, ids, strict=True):
        if row.shape != rows[0].shape:
            raise ValueError(
                f"{name}: shape {list(row.shape)} of {id_!r} differs from shape {list(rows[0].shape)} of {ids[0]!r}; samples "
                "of one bucket must have equal shapes"
            )
    return torch.stack(list(rows))
