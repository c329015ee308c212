"""`Collectives`: counter of the collectives in a block of code, from the operators that torch dispatches."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = ("all_", "allgather", "allreduce", "alltoall", "broadcast", "reduce")
"""Prefixes of the names of collective operators."""


class Collectives(TorchDispatchMode):
    """Context manager that counts collectives and the bytes that leave this process.

    Args:
        size: number of processes in the group.

    Attributes:
        calls: number of collectives, by name of the operator.
        nbytes: bytes that this process sends to other processes, by name of the operator. An all-to-all sends all pieces
            but the process's own; an all-gather sends its piece to every other process.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.calls: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        space, short, _ = str(func).split(".")
        short = short.strip("_")
        if "c10d" in space and short.startswith(KINDS):
            self.calls[short] += 1
            self.nbytes[short] += self._sent(short, args)
        return func(*args, **(kwargs or {}))

    def _sent(self, name: str, args: tuple) -> int:
        tensors: list[torch.Tensor] = []
        for x in torch.utils._pytree.tree_leaves(args):
            if isinstance(x, torch.Tensor):
                tensors.append(x)
        if "all_to_all" in name or "alltoall" in name:
            source = tensors[-1]
            return source.nbytes * (self.size - 1) // self.size
        return min(x.nbytes for x in tensors) * (self.size - 1)
