"""Attention over product-quantised keys and values: README.md has the equations."""

from dit_accel.kernels.lut_attention.op import MAX_ROWS, lut_attention

__all__ = ["MAX_ROWS", "lut_attention"]
