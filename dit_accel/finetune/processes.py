"""`Processes`: collective operations over the processes of a training run."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Answer = TypeVar("Answer")


class Processes:
    """Rank, number of processes, and the collective operations of training.

    Without an initialised `torch.distributed` there is one process, and every operation is local.

    Args:
        device: device of the exchanged tensors.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.count = dist.get_world_size() if together else 1

    @property
    def is_main(self) -> bool:
        """True if this process writes the files of the run."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, sorted by rank. The values must be plain Python objects."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all processes."""
        if self.count == 1:
            return values
        total = values.detach().clone().to(self.device)
        dist.all_reduce(total)
        return total

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over all processes. A single process returns `values` itself."""
        return values if self.count == 1 else self.sum(values) / self.count

    @torch.no_grad()
    def copy_from_main(self, tensors: list[Tensor]) -> None:
        """Overwrite tensors with the values of the main process."""
        if self.count > 1:
            for x in tensors:
                dist.broadcast(x, src=0)

    def barrier(self) -> None:
        """Wait until all processes have reached this call."""
        if self.count > 1:
            dist.barrier()

    def together(self, action: Callable[[], Answer]) -> list[Answer]:
        """Run an action in every process, and return the results sorted by rank.

        An error in one process raises an error in all of them, so that no process waits forever.

        Raises:
            Exception: the error of this process.
            OSError, ValueError, RuntimeError: the error of the first other process that failed. Errors of other
                classes are raised as RuntimeError.
        """
        error: Exception | None = None
        result: Any = None
        try:
            result = action()
        except Exception as caught:  # report every error, because other processes wait in `gather`
            error = caught
        found = self.gather((result, None if error is None else (type(error).__name__, str(error))))
        if error is not None:
            raise error
        for rank, (_, failure) in enumerate(found):
            if failure is not None:
                name, message = failure
                kind = {"OSError": OSError, "ValueError": ValueError}.get(name, RuntimeError)
                named = "" if name == kind.__name__ else f"{name}: "
                raise kind(f"process {rank}: {named}{message}")
        return [answer for answer, _ in found]

    def main_only(self, action: Callable[[], Answer]) -> Answer:
        """Run an action in the main process, and return its result in every process.

        Raises:
            Exception: in every process, if the action fails. See `together`.
        """
        return self.together(lambda: action() if self.is_main else None)[0]  # type: ignore[return-value]
