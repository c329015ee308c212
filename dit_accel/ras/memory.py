"""Bytes that region-adaptive sampling takes, and bytes that are free."""

import math

import torch

from dit_accel.ras.history import BUFFERS


def bytes_per_token(kv_heads: int, head_dim: int, itemsize: int, policy: str) -> float:
    """Cached keys and values of one token in one layer."""
    if policy == "fp8":
        return 2.0 * kv_heads * (head_dim + torch.float32.itemsize)
    return 2.0 * kv_heads * head_dim * itemsize


def cache_bytes(
    layers: list[tuple[int, int, int]], rows: int, itemsize: int, policy: str, linear: bool
) -> int:
    """Cached keys and values of all layers.

    Args:
        layers: (tokens, kv_heads, head_dim) of each layer.
        rows: of a batch, both halves of guidance included.
        itemsize: bytes of a number in the model's dtype.
        policy: "full" or "fp8".
        linear: whether changes are kept as well.
    """
    if policy not in BUFFERS:
        raise ValueError(f"policy={policy!r}: accepted are {', '.join(BUFFERS)}")
    one = sum(n * bytes_per_token(h, d, itemsize, policy) for n, h, d in layers)
    return math.ceil(one * rows * (2 if linear else 1))


def free_bytes(device: torch.device) -> int:
    """Memory that an allocation on this device can still get."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds without using it serves new tensors first.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return psutil.virtual_memory().available
