"""Which key blocks matter to a query block: see README.md for the equation."""

from dit_accel.kernels.router.pooling import pool_blocks, pool_moments
from dit_accel.kernels.router.scores import block_scores

__all__ = ["block_scores", "pool_blocks", "pool_moments"]
