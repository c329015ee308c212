"""Sparse-linear attention for diffusion transformers: the layer, its schedule, token orders. Model-free."""

from dit_accel.sla.attention import SparseLinearAttention
from dit_accel.sla.order import Reordered, tile_order
from dit_accel.sla.schedule import LayerStats, SparseAttention

__all__ = [
    "LayerStats",
    "Reordered",
    "SparseAttention",
    "SparseLinearAttention",
    "tile_order",
]
