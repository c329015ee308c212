"""Estimates of attention from a few queries, for the patterns that need one: sums over columns and diagonals."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from dit_accel.kernels.precision import no_autocast, wide

CHUNK_SCORES = 2**24
"""Scores that are held at one time, over all batches and heads: 64 MiB in fp32."""


class QuerySums(NamedTuple):
    """Mean attention of some queries, by key and by distance. Each row of either adds up to 1."""

    columns: Float[Tensor, "b h l_k"]
    """Mean weight of each key."""
    diagonals: Float[Tensor, "b h l_k"]
    """Mean weight of the key that lies so many places before the query; 0 is the query's own position."""


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
        k: keys `[B, Hkv, Lk, D]`.
        scale: factor of the dot products.
        last: number of queries; all of them where there are fewer.
    """
    rows = range(max(0, q.shape[2] - last), q.shape[2])
    columns = q.new_zeros(*q.shape[:2], k.shape[2], dtype=wide(q))
    diagonals = torch.zeros_like(columns)
    for some, weights in attention_of(q, k, rows, scale):
        n, width = weights.shape[2:]
        columns[..., :width] += weights.sum(2)
        # With n - 1 zeros in front, a diagonal advances by one row and one place at a time.
        skewed = pad(weights, (n - 1, 0)).flatten(0, 1)
        steps = skewed.stride(0), width + n, 1
        sums = skewed.as_strided((len(skewed), n, width), steps).sum(1)
        diagonals[..., :width] += sums.flip(-1).unflatten(0, columns.shape[:2])
        assert some.step == 1
    return QuerySums(columns / len(rows), diagonals / len(rows))


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
    """Return the mean weight of each key in some queries that do not read it, `[B, Hq, Lk]`.

    Args:
        q: queries at the last positions, `[B, Hq, Lq, D]`.
        k: keys `[B, Hkv, Lk, D]`.
        rows: the queries, ascending.
        scale: factor of the dot products.
        read: blocks that are read, `[B|1, Hq|1, T_q, T_k]`.
        block: tokens per query block and per key block.
    """
    columns = q.new_zeros(*q.shape[:2], k.shape[2], dtype=wide(q))
    for some, weights in attention_of(q, k, rows, scale):
        width = weights.shape[3]
        unread = ~read[:, :, torch.tensor(some, device=q.device) // block]
        unread = unread.repeat_interleave(block, -1)[..., :width]
        columns[..., :width] += (weights * unread).sum(2)
    return columns / max(1, len(rows))


def attention_of(
    q: Float[Tensor, "b h_q l_q d"], k: Float[Tensor, "b h_kv l_k d"], rows: range, scale: float
) -> Iterator[tuple[range, Float[Tensor, "b h_q n l_seen"]]]:
    """Yield the exact softmax weights of some queries, a few queries of all heads at a time.

    The weights end with the last key that one of these queries sees. Products are made in the dtype of the inputs, all
    else in fp32 or wider.
    """
    groups = k.shape[1], q.shape[1] // k.shape[1]
    offset = k.shape[2] - q.shape[2]
    step = max(1, CHUNK_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        width = some[-1] + 1 + offset
        chosen = q[:, :, some.start : some.stop : some.step] * scale
        with no_autocast(q):
            products = chosen.unflatten(1, groups).flatten(2, 3) @ k[:, :, :width].mT
        scores = products.unflatten(2, (groups[1], len(some))).flatten(1, 2).to(wide(q))
        at = torch.tensor(some, device=q.device)[:, None] + offset
        hidden = torch.arange(width, device=q.device) > at
        yield some, torch.softmax(scores.masked_fill_(hidden, -torch.inf), -1)


def spread_rows(stop: int, most: int = 64) -> range:
    """Return at most `most` queries, evenly spread over the first `stop`."""
    step = max(1, -(-stop // most))
    return range(min(step // 2, max(0, stop - 1)), stop, step)


def top_columns(sums: Float[Tensor, "b h l_k"], count: int) -> Int[Tensor, "b h n"]:
    """Return the keys with the largest sums as a plan's `columns`: ascending, and only those above 0.

    Args:
        sums: worth of each key, `[B, H, Lk]`.
        count: number of keys for each head, at most.
    """
    worth, keys = sums.topk(min(count, sums.shape[-1]), -1)
    return keys.masked_fill(worth <= 0, sums.shape[-1]).sort(-1).values.int()
