"""Attention over the blocks of a plan. README.md has the equations."""

from dit_accel.kernels.block_sparse.op import block_sparse_attention, sparse_linear_attention

__all__ = ["block_sparse_attention", "sparse_linear_attention"]
