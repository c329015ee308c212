"""Dtypes of sums and products. `torch.autocast` affects the dtype of the inputs only."""

import contextlib

import torch
from torch import Tensor


def wide(x: Tensor) -> torch.dtype:
    """Return the dtype of sums over `x`: fp32, or fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the dtype of autocast, as SDPA does; unchanged if autocast is off."""
    kind = tensors[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors
    )


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Return a context manager that turns autocast off on the device of `x`."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)
