"""`Feed`: load the micro-batches of this process for each step."""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from dit_accel.finetune.batch import Batch


class Feed:
    """Micro-batches of this process, taken from the global batch of each step.

    Row r of the global batch belongs to micro-batch r // (size * processes), and within it to process
    (r // size) % processes. The global batch does not depend on the number of processes, so the gradient of a step
    does not depend on it either.

    Args:
        samples: training samples (`finetune.data.samples.Samples`).
        order: order of the global batches (`finetune.data.order.Order`).
        load: function that loads a batch (`load_batch`).
        size: number of samples in a micro-batch of one process.
        accumulation: number of micro-batches per step.
        rank: rank of this process.
        processes: number of processes.
        device: device of the returned batches.
        ahead: load the next micro-batch in a thread while the current one trains. Use it only for samples that are
            loaded without running a neural network.
    """

    def __init__(
        self,
        samples: Any,
        order: Any,
        load: Callable[[Any, Sequence[int]], Batch],
        *,
        size: int,
        accumulation: int = 1,
        rank: int = 0,
        processes: int = 1,
        device: torch.device | str = "cpu",
        ahead: bool = False,
    ) -> None:
        self.samples, self.order, self.load = samples, order, load
        self.size, self.accumulation = size, accumulation
        self.rank, self.processes = rank, processes
        self.device = torch.device(device)
        self._pool = ThreadPoolExecutor(1, "dit-accel-feed") if ahead else None
        self._next: tuple[tuple[int, int], Future[Batch]] | None = None

    def first_row(self, micro: int) -> int:
        """Return the index in the global batch of the first row of a micro-batch of this process."""
        return (micro * self.processes + self.rank) * self.size

    def rows(self, step: int, first: int, count: int) -> Batch:
        """Return `count` rows of the global batch of a step, starting at `first`, on the device."""
        indices = self.order.batch(step)[first : first + count]
        return self.load(self.samples, indices).to(self.device)

    def micro(self, step: int, micro: int) -> Batch:
        """Return a micro-batch of this process, on the device."""
        wanted, found = (step, micro), self._next
        if self._pool is None:
            return self.load(self.samples, self._indices(*wanted)).to(self.device)
        if found is not None and found[0] == wanted:
            batch = found[1].result()
        else:
            batch = self.load(self.samples, self._indices(*wanted))
        follows = (step, micro + 1) if micro + 1 < self.accumulation else (step + 1, 0)
        # Compute the indices in this thread, because `Order` is not thread-safe.
        indices = self._indices(*follows)
        self._next = (follows, self._pool.submit(self.load, self.samples, indices))
        return batch.to(self.device)

    def _indices(self, step: int, micro: int) -> Sequence[int]:
        first = self.first_row(micro)
        return self.order.batch(step)[first : first + self.size]

    @property
    def samples_sha256(self) -> str:
        """Hash of the names and buckets of all samples in order."""
        names = [list(self.samples.ids), list(self.samples.buckets)]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()

    def close(self) -> None:
        """Stop the loader thread."""
        if self._pool is not None:
            self._next = None
            self._pool.shutdown(wait=True, cancel_futures=True)
