"""The linear branch: feature maps, totals, and both backends' parts of it."""

from dit_accel.kernels.linear.attention import linear_attention
from dit_accel.kernels.linear.state import LinearState

__all__ = ["LinearState", "linear_attention"]
