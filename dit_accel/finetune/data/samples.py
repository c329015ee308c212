"""`Samples`: what training reads, whatever it comes from; and batches of them."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dit_accel.finetune.batch import Batch

Sample = tuple[Tensor, dict[str, Tensor]]
"""Latents `[C, (F,) H, W]` in fp32, and conditions without batch dimension."""


@runtime_checkable
class Samples(Protocol):
    """Training samples by index.

    Where there is a method `prefetch(indices)`, `load_batch` calls it first, so that files are read at once.
    """

    buckets: Sequence[str]
    """Bucket of each sample, such as "33x64x64" (frames x height x width in pixels). Samples of one bucket have
    equal shapes."""
    ids: Sequence[str]

    def sample(self, index: int) -> Sample:
        """Return one sample.

        Raises:
            ValueError: it cannot be read; the message names its file.
        """
        ...


def load_batch(samples: Samples, indices: Sequence[int]) -> Batch:
    """Return samples of one bucket as a batch.

    Args:
        samples: where they come from.
        indices: at least one; all of one bucket.

    Raises:
        ValueError: no index, several buckets, or a sample that cannot be read.
    """
    names = {samples.buckets[i] for i in indices}
    if len(names) != 1:
        raise ValueError(
            f"indices={list(indices)}: of the buckets {sorted(names)}; accepted is one bucket"
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
                f"{name} of {id_!r} are {list(row.shape)}, of {ids[0]!r} {list(rows[0].shape)}; accepted is one shape in a "
                "bucket"
            )
    return torch.stack(list(rows))
