"""`Order`: which samples make which batch."""

import bisect
import hashlib
import itertools
from collections.abc import Sequence

import torch


class Order:
    """Batches as a function of seed and step, without any state that a checkpoint would have to hold.

    An epoch has every sample at least once. Each batch is of one bucket. The last batch of a bucket is filled
    by samples of that bucket from the same epoch. Every epoch shuffles samples and batches anew.
    """

    def __init__(self, buckets: Sequence[str], batch_size: int, seed: int) -> None:
        """Plan the batches.

        Args:
            buckets: bucket of each sample.
            batch_size: samples of one optimiser step, on all processes together.
            seed: of the shuffling.

        Raises:
            ValueError: no sample, or a batch_size below 1.
        """
        if not buckets:
            raise ValueError("buckets=[]: accepted is at least one sample")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: accepted is an int >= 1")
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
        """Optimiser steps in which every sample is used."""
        return self._first[-1]

    def batch(self, step: int) -> list[int]:
        """Return the indices of the samples of optimiser step `step`, counted from 0; all of one bucket.

        Raises:
            ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"step={step}: accepted is an int >= 0")
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
        """Return the order of the batches, and of the samples of each bucket."""
        digest = hashlib.sha256(f"order {self._seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        batches = torch.randperm(self.steps_per_epoch, generator=generator)
        samples = [x[torch.randperm(len(x), generator=generator)] for x in self._members]
        return batches, samples
