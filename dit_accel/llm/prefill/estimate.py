"""Attention estimates from a few queries, used by several patterns: sums over key columns and diagonals."""

from jaxtyping import Float, Int
from torch import Tensor

from dit_accel.kernels.query_sums import QuerySums, column_sums, last_query_sums

__all__ = ["QuerySums", "column_sums", "last_query_sums", "spread_rows", "top_columns"]


def spread_rows(stop: int, most: int = 64) -> range:
    """Return at most `most` query indices, evenly spread over the first `stop` queries."""
    step = max(1, -(-stop // most))
    return range(min(step // 2, max(0, stop - 1)), stop, step)


def top_columns(sums: Float[Tensor, "b h l_k"], count: int) -> Int[Tensor, "b h n"]:
    """Return the keys with the largest positive sums in ascending order, as `columns` of a `SparsePlan`.

    Args:
        sums: attention sum of each key, `[B, H, Lk]`.
        count: maximum number of keys per head.
    """
    worth, keys = sums.topk(min(count, sums.shape[-1]), -1)
    return keys.masked_fill(worth <= 0, sums.shape[-1]).sort(-1).values.int()
