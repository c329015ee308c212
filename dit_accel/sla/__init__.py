"""Sparse attention for diffusion transformers: token orders, schedule, counting. Model-free."""

from dit_accel.sla.attention import LayerStats, SparseAttention
from dit_accel.sla.order import TokenOrder, tile_order

__all__ = ["LayerStats", "SparseAttention", "TokenOrder", "tile_order"]
