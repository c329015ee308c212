"""Linear branch: feature maps, totals, and its parts of the torch and Triton backends."""

from dit_accel.kernels.linear.attention import linear_attention
from dit_accel.kernels.linear.state import LinearState

__all__ = ["LinearState", "linear_attention"]
