"""Means over the processes of `torch.distributed`; without it there is one process."""

import torch.distributed as dist
from torch import Tensor


def count() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def averaged(x: Tensor) -> Tensor:
    """Return the mean over all processes; `x` itself where there is one."""
    if count() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / count()
