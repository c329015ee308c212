"""`SideStream`: runs cache updates on a second CUDA stream, in parallel with the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from dit_accel.llm.kvcache.part import Part


class SideStream:
    """Runs the cache updates of one layer on a second CUDA stream. On a CPU they run immediately.

    Args:
        on: use a second stream on CUDA devices.
    """

    def __init__(self, on: bool) -> None:
        self.on = on
        self.done: torch.cuda.Event | None = None
        """Event at the end of the running work; None if no work is running."""
        self.device: torch.device | None = None
        """Device of the running work."""

    @contextmanager
    def work(self, part: Part) -> Iterator[None]:
        """Context manager that runs its block on the second stream.

        Args:
            part: tokens that the block reads. They were made on the stream of the model.
        """
        device = part.k.device
        if not self.on or device.type != "cuda":
            yield
            return
        side = _stream(device)
        # Memory freed by earlier work may still be read by operations in the queue of the model's stream.
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            yield
            self.done, self.device = side.record_event(), device
        for x in (*part.tensors.values(), *([] if part.valid is None else [part.valid])):
            x.record_stream(side)

    def wait(self) -> None:
        """Make the stream of the model wait for the running work."""
        if self.done is not None:
            torch.cuda.current_stream(self.device).wait_event(self.done)
            self.done = None


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
