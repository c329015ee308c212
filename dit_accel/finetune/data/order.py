"""`Order`: assign samples to batches."""

import bisect
import hashlib
import itertools
from collections.abc import Sequence

import torch


class Order:
    """Order of the samples as a function of seed and step, so that checkpoints need not store its state.

    An epoch contains every sample at least once. All samples of a batch belong to one bucket. The last batch of a
    bucket is filled with samples of that bucket from the same epoch. Each epoch shuffles samples and batches again.
    """

    def __init__(self, buckets: Sequence[str], batch_size: int, seed: int) -> None:
        """Plan the batches.

        Args:
            buckets: bucket of each sample.
            batch_size: number of samples per optimiser step over all processes.
            seed: seed of the shuffling.

        Raises:
            ValueError: if there are no samples, or if batch_size is below 1.
        """
        if not buckets:
            raise ValueError("buckets=[]: must hold at least one sample")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be an int >= 1")
        self._batch_size, self._seed = batch_size, seed
        members: dict[str, list[int]] = {}
        for index, bucket in enumerate(buckets):
            members.setdefault(bucket, []).append(index)
        self._members = [torch.tensor(members[name]) for name in sorted(members)]
        counts = [-(-len(x) // batch_size) for x in self._members]
        self._first = list(itertools.accumulate(counts, initial=0))
        self._epoch: tuple[int, torch.Tensor, list[torch.Tensor]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimiser steps in an epoch."""
        return self._first[-1]

    def batch(self, step: int) -> list[int]:
        """Return the indices of the samples of an optimiser step. All of them belong to one bucket.

        Args:
            step: index of the optimiser step, starting at 0.

        Raises:
            ValueError: if the step is negative.
        """
        if step < 0:
            raise ValueError(f"step={step}: must be an int >= 0")
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, *self._shuffled(epoch)
        _, batches, samples = self._epoch
        number = int(batches[place])
        bucket = bisect.bisect_right(self._first, number) - 1
        begin = (number - self._first[bucket]) * self._batch_size
        members = samples[bucket]
        return [int(members[i % len(members)]) for i in range(begin, begin + self._batch_size)]

    def _shuffled(self, epoch: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the order of the batches, and the order of the samples of each bucket."""
        digest = hashlib.sha256(f"order {self._seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        batches = torch.randperm(self.steps_per_epoch, generator=generator)
        samples = [x[torch.randperm(len(x), generator=generator)] for x in self._members]
        return batches, samples
