"""Attention over product-quantised keys and values. README.md has the equations."""

from dit_accel.kernels.lut_attention.op import MAX_ROWS, lut_attention
from dit_accel.kernels.lut_attention.reference import factors, turned_pairs

__all__ = ["MAX_ROWS", "factors", "lut_attention", "turned_pairs"]
