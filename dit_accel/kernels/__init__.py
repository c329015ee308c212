"""Tensors in, tensors out: block-sparse attention, its plan and its router.

Everything here knows torch only (and, later, triton): never diffusers or transformers.
"""

from dit_accel.kernels.block_sparse import block_sparse_attention, sparse_linear_attention
from dit_accel.kernels.plan import SparsePlan
from dit_accel.kernels.router import block_scores

__all__ = ["SparsePlan", "block_scores", "block_sparse_attention", "sparse_linear_attention"]
