"""Attention of a few queries, summed by key and by distance, for sparse prefill. README.md has the equations."""

from dit_accel.kernels.query_sums.op import QuerySums, column_sums, last_query_sums

__all__ = ["QuerySums", "column_sums", "last_query_sums"]
