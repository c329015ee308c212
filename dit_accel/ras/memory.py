"""Memory of region-adaptive sampling: bytes of its caches, and free bytes."""

import math
from dataclasses import dataclass

import torch

from dit_accel.config import RASConfig
from dit_accel.models import AttentionLayer
from dit_accel.ras.history import BUFFERS

WORKING = 32
"""Peak memory of a transformer call, in numbers per token and channel."""


@dataclass(frozen=True)
class Layer:
    """Sizes of the cache of one attention layer."""

    tokens: int
    kv_heads: int
    head_dim: int
    width: int
    """Number of channels of the model's hidden states."""


@dataclass(frozen=True)
class CachePlan:
    """Caches of a run and their sizes in bytes."""

    linear_kv: bool
    """True if keys and values are extrapolated, which doubles their memory."""
    kv_bytes: int
    """Bytes of cached keys and values, all contexts together."""
    working_bytes: int
    """Bytes that a call of the transformer needs in addition."""
    free_bytes: int
    """Free bytes of the device."""

    @property
    def fits(self) -> bool:
        """True if the caches and a call fit into the free memory."""
        return self.kv_bytes + self.working_bytes <= self.free_bytes


def cached_layers(
    layers: dict[str, AttentionLayer], tokens: int, text: int, sharing: int = 1
) -> list[Layer]:
    """Return the sizes of each layer's cache.

    Args:
        layers: self-attention layers by name.
        tokens: number of image tokens.
        text: number of text tokens.
        sharing: number of processes that split the heads.
    """
    return [
        Layer(
            tokens=tokens + (0 if x.layout == "image" else text),
            kv_heads=-(-x.kv_heads // sharing),
            head_dim=x.head_dim,
            width=-(-x.module.heads * x.head_dim // sharing),
        )
        for x in layers.values()
    ]


def bytes_per_token(kv_heads: int, head_dim: int, itemsize: int, policy: str) -> float:
    """Return the bytes of cached keys and values of one token in one layer."""
    if policy not in BUFFERS:
        raise ValueError(f"policy={policy!r}: accepted are {', '.join(BUFFERS)}")
    if policy == "fp8":
        return 2.0 * kv_heads * (head_dim + torch.float32.itemsize)
    return 2.0 * kv_heads * head_dim * itemsize


def plan_cache(
    config: RASConfig,
    num_steps: int,
    layers: list[Layer],
    *,
    rows: int,
    contexts: int,
    itemsize: int,
    free: int,
) -> CachePlan:
    """Return the caches of a run. With kv_predictor="auto", do not extrapolate if the memory is too small for it.

    Args:
        config: settings.
        num_steps: number of steps of the run.
        layers: sizes of all self-attention layers.
        rows: number of rows in a call of the transformer.
        contexts: number of calls in a step; each has its own cache.
        itemsize: bytes of a number in the model's dtype.
        free: free bytes of the device, see `free_bytes`.
    """
    one = sum(
        x.tokens * bytes_per_token(x.kv_heads, x.head_dim, itemsize, config.kv_cache)
        for x in layers
    )
    working = max(x.tokens * x.width for x in layers) * rows * itemsize * WORKING

    if not config.has_partial_steps:
        return CachePlan(False, 0, working, free)

    def plan(linear: bool) -> CachePlan:
        kv = math.ceil(one * rows * contexts * (2 if linear else 1))
        return CachePlan(linear, kv, working, free)

    wanted = plan(config.linear_kv(num_steps))
    return plan(False) if config.kv_predictor == "auto" and not wanted.fits else wanted


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Memory that torch has reserved without using it is free too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return psutil.virtual_memory().available
