"""Public functions of the query sums, and their operators. They run the kernels on a GPU, else torch."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dit_accel.kernels.launch import runs_here
from dit_accel.kernels.operators import operator
from dit_accel.kernels.precision import wide
from dit_accel.kernels.query_sums import torch_sums

MAX_HEAD_DIM = 256
"""Largest head_dim for the kernels. Tiles of wider heads do not fit into shared memory; torch computes them."""


class QuerySums(NamedTuple):
    """Mean attention of some queries, by key and by distance. Each row of `columns` and of `diagonals` sums to 1."""

    columns: Float[Tensor, "b h l_k"]
    """Mean weight of each key."""
    diagonals: Float[Tensor, "b h l_k"]
    """Mean weight of the key at each distance before the query. Distance 0 is the query's own position."""


@torch.no_grad()
def last_query_sums(
    q: Float[Tensor, "b h_q l_q d"],
    k: Float[Tensor, "b h_kv l_k d"],
    *,
    scale: float,
    last: int = 64,
) -> QuerySums:
    """Return the mean attention of the last queries, by key and by distance.

    Args:
        q: queries at the last positions, `[B, Hq, Lq, D]`.
        k: keys `[B, Hkv, Lk, D]`; `Hq` is a multiple of `Hkv`, `Lq <= Lk`.
        scale: factor of the dot products.
        last: number of queries. If `q` has fewer, all of them.
    """
    _check(q, k)
    if last < 1:
        raise ValueError(f"last={last}: accepted is an int >= 1")
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    return QuerySums(*torch.ops.dit_accel.last_query_sums(q, k, float(scale), last))


@torch.no_grad()
def column_sums(
    q: Float[Tensor, "b h_q l_q d"],
    k: Float[Tensor, "b h_kv l_k d"],
    rows: range,
    *,
    scale: float,
    read: Bool[Tensor, "b_r h_r n_q n_k"],
    block: int,
) -> Float[Tensor, "b h_q l_k"]:
    """Return the mean attention weight of each key over some queries, without the blocks that are read, `[B, Hq, Lk]`.

    Args:
        q: queries at the last positions, `[B, Hq, Lq, D]`.
        k: keys `[B, Hkv, Lk, D]`; `Hq` is a multiple of `Hkv`, `Lq <= Lk`.
        rows: indices of the queries, ascending.
        scale: factor of the dot products.
        read: mask of blocks that are read, `[B|1, Hq|Hkv|1, T_q, T_k]`. Their pairs count as 0.
        block: tokens per query block and per key block.
    """
    _check(q, k)
    if len(rows) and not (0 <= rows[0] <= rows[-1] < q.shape[2]):
        raise ValueError(f"rows={rows}: accepted are ascending indices from 0 to {q.shape[2] - 1}")
    n_q, n_k = -(-q.shape[2] // block), -(-k.shape[2] // block)
    heads = (1, k.shape[1], q.shape[1])
    fits = read.shape[0] in (1, q.shape[0]) and read.shape[1] in heads
    if not fits or tuple(read.shape[2:]) != (n_q, n_k):
        raise ValueError(
            f"read: shape {tuple(read.shape)}; accepted is [1 or {q.shape[0]}, one of {heads}, {n_q}, {n_k}]"
        )
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    return torch.ops.dit_accel.column_sums(
        q, k, read, rows.start, rows.stop, rows.step, float(scale), block
    )


def _check(q: Tensor, k: Tensor) -> None:
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q: {q.shape[1]} heads, which is no multiple of the {k.shape[1]} heads of k"
        )
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            f"q: {q.shape[2]} queries; accepted are at most {k.shape[2]}, the number of keys"
        )


def _runs_kernels(q: Tensor) -> bool:
    return runs_here(q) and q.shape[-1] <= MAX_HEAD_DIM


def _no_columns(q: Tensor, k: Tensor, *rest: object) -> Tensor:
    """Return an empty result of `column_sums`."""
    return q.new_empty(*q.shape[:2], k.shape[2], dtype=wide(q))


def _no_sums(q: Tensor, k: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """Return an empty result of `last_query_sums`."""
    return _no_columns(q, k), _no_columns(q, k)


@operator("last_query_sums", _no_sums)
def _last_query_sums(q: Tensor, k: Tensor, scale: float, last: int) -> tuple[Tensor, Tensor]:
    if not _runs_kernels(q):
        return torch_sums.last_query_sums(q, k, scale, last)
    from dit_accel.kernels.query_sums.sums_kernel import sums_launches

    columns, diagonals = _no_sums(q, k)
    rows = range(max(0, q.shape[2] - last), q.shape[2])
    for launch in sums_launches(q, k, rows, columns, diagonals, scale=scale):
        launch()
    return columns, diagonals


@operator("column_sums", _no_columns)
def _column_sums(
    q: Tensor, k: Tensor, read: Tensor, start: int, stop: int, step: int, scale: float, block: int
) -> Tensor:
    rows = range(start, stop, step)
    if not rows or not _runs_kernels(q):
        return torch_sums.column_sums(q, k, rows, scale, read, block)
    from dit_accel.kernels.query_sums.sums_kernel import sums_launches

    columns = _no_columns(q, k)
    for launch in sums_launches(q, k, rows, columns, None, scale=scale, read=read, block=block):
        launch()
    return columns
