"""Which key blocks matter to a query block: see README.md for the equation."""

from dit_accel.kernels.router.scores import block_scores, pool_blocks, pool_moments

__all__ = ["block_scores", "pool_blocks", "pool_moments"]
