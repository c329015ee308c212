"""Router: scores of key blocks for each query block, and selection of blocks. README.md has the equations."""

from dit_accel.kernels.router.pooling import pool_blocks
from dit_accel.kernels.router.scores import block_scores
from dit_accel.kernels.router.soft_topk import soft_topk

__all__ = ["block_scores", "pool_blocks", "soft_topk"]
