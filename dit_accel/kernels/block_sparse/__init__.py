"""Attention over the blocks of a plan: see README.md for the maths."""

from dit_accel.kernels.block_sparse.op import block_sparse_attention, sparse_linear_attention

__all__ = ["block_sparse_attention", "sparse_linear_attention"]
