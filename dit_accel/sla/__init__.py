"""Sparse-linear attention for diffusion transformers: layer, schedule and token orders. Independent of models."""

from dit_accel.sla.attention import SparseLinearAttention
from dit_accel.sla.order import Reordered, tile_order
from dit_accel.sla.schedule import SparseAttention

__all__ = [
    "Reordered",
    "SparseAttention",
    "SparseLinearAttention",
    "tile_order",
]
