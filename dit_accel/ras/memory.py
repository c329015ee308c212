"""Bytes that region-adaptive sampling takes, and bytes that are free."""

import math
from dataclasses import dataclass

import torch

from dit_accel.config import RASConfig
from dit_accel.models import AttentionLayer
from dit_accel.ras.history import BUFFERS

WORKING = 32
"""Numbers per token and model width that a call of the transformer itself needs at its peak."""


@dataclass(frozen=True)
class Layer:
    """What one attention layer has to keep."""

    tokens: int
    kv_heads: int
    head_dim: int
    width: int
    """Of the model's hidden states."""


@dataclass(frozen=True)
class CachePlan:
    """What will be kept in a run."""

    linear_kv: bool
    """Whether keys and values are extrapolated, which takes twice the memory."""
    kv_bytes: int
    """Cached keys and values of all contexts."""
    working_bytes: int
    """What a call of the transformer takes beside them."""
    free_bytes: int

    @property
    def fits(self) -> bool:
        return self.kv_bytes + self.working_bytes <= self.free_bytes


def cached_layers(
    layers: dict[str, AttentionLayer], tokens: int, text: int, sharing: int = 1
) -> list[Layer]:
    """Return the tokens and heads that each layer keeps, with this many processes that share the heads."""
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
    """Cached keys and values of one token in one layer."""
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
    """What a run keeps; with kv_predictor="auto", extrapolation is given up where only that helps.

    Args:
        config: what is asked for.
        num_steps: of the run.
        layers: all self-attention layers.
        rows: of one call of the transformer.
        contexts: calls of a step, each of which has its own cache.
        itemsize: bytes of a number in the model's dtype.
        free: see `free_bytes`.
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
    """Memory that an allocation on this device can still get."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds without using it serves new tensors first.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return psutil.virtual_memory().available
