"""Block-sparse and sparse-linear attention on tensors, with their plan and their router.

This package needs torch. It imports triton at the first call that needs it, and never diffusers or
transformers.
"""

from dit_accel.kernels.block_sparse import block_sparse_attention, sparse_linear_attention
from dit_accel.kernels.geometry import Geometry
from dit_accel.kernels.linear import LinearState, linear_attention
from dit_accel.kernels.merge import merge_lse
from dit_accel.kernels.plan import SparsePlan
from dit_accel.kernels.router import block_scores

__all__ = [
    "Geometry",
    "LinearState",
    "SparsePlan",
    "block_scores",
    "block_sparse_attention",
    "linear_attention",
    "merge_lse",
    "sparse_linear_attention",
]
