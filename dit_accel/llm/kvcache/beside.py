"""`Beside`: work on a second stream of a GPU, while the model's own stream goes on."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from dit_accel.llm.kvcache.part import Part


class Beside:
    """Work for one layer of a cache that runs beside the model. On a CPU it runs at once.

    Args:
        on: whether a second stream is used where there is one.
    """

    def __init__(self, on: bool) -> None:
        self.on = on
        self.done: torch.cuda.Event | None = None
        """End of the work that runs; None: nothing does."""
        self.device: torch.device | None = None
        """Device that it runs on."""

    @contextmanager
    def work(self, part: Part) -> Iterator[None]:
        """Run the block beside the model.

        Args:
            part: tokens that the block reads, which the model made.
        """
        device = part.k.device
        if not self.on or device.type != "cuda":
            yield
            return
        side = _stream(device)
        # What earlier work has freed may still be read by what the model has in its queue.
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            yield
            self.done, self.device = side.record_event(), device
        for x in (*part.tensors.values(), *([] if part.valid is None else [part.valid])):
            x.record_stream(side)

    def wait(self) -> None:
        """Let what the model does next wait for the work."""
        if self.done is not None:
            torch.cuda.current_stream(self.device).wait_event(self.done)
            self.done = None


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
