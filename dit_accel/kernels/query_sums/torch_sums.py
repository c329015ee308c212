"""Reference implementation of the sums in torch, in chunks of queries, for any device and floating dtype."""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from dit_accel.kernels.precision import no_autocast, wide

CHUNK_SCORES = 2**24
"""Number of scores in memory at a time, over all batch entries and heads: 64 MiB in fp32."""


def last_query_sums(
    q: Float[Tensor, "b h_q l_q d"], k: Float[Tensor, "b h_kv l_k d"], scale: float, last: int
) -> tuple[Float[Tensor, "b h_q l_k"], Float[Tensor, "b h_q l_k"]]:
    """Return the mean attention of the last queries by key and by distance."""
    rows = range(max(0, q.shape[2] - last), q.shape[2])
    columns = q.new_zeros(*q.shape[:2], k.shape[2], dtype=wide(q))
    diagonals = torch.zeros_like(columns)
    for _, weights in attention_of(q, k, rows, scale):
        n, width = weights.shape[2:]
        columns[..., :width] += weights.sum(2)
        # With n - 1 zeros in front, a diagonal is a strided view: one row and one column further with each element.
        skewed = pad(weights, (n - 1, 0)).flatten(0, 1)
        steps = skewed.stride(0), width + n, 1
        sums = skewed.as_strided((len(skewed), n, width), steps).sum(1)
        diagonals[..., :width] += sums.flip(-1).unflatten(0, columns.shape[:2])
    return columns / len(rows), diagonals / len(rows)


def column_sums(
    q: Float[Tensor, "b h_q l_q d"],
    k: Float[Tensor, "b h_kv l_k d"],
    rows: range,
    scale: float,
    read: Bool[Tensor, "b_r h_r n_q n_k"],
    block: int,
) -> Float[Tensor, "b h_q l_k"]:
    """Return the mean attention weight of each key over some queries, without the pairs in blocks that are read."""
    columns = q.new_zeros(*q.shape[:2], k.shape[2], dtype=wide(q))
    for some, weights in attention_of(q, k, rows, scale):
        width = weights.shape[3]
        unread = ~read[:, :, torch.tensor(some, device=q.device) // block]
        unread = unread.repeat_interleave(block, -1)[..., :width]
        if 1 < unread.shape[1] < q.shape[1]:  # the heads of a group share blocks
            unread = unread.repeat_interleave(q.shape[1] // unread.shape[1], 1)
        columns[..., :width] += (weights * unread).sum(2)
    return columns / max(1, len(rows))


def attention_of(
    q: Float[Tensor, "b h_q l_q d"], k: Float[Tensor, "b h_kv l_k d"], rows: range, scale: float
) -> Iterator[tuple[range, Float[Tensor, "b h_q n l_seen"]]]:
    """Yield the exact softmax weights of some queries, a few queries of all heads at a time.

    The weights end with the last key that one of these queries sees. Products use the dtype of the inputs, all other
    operations fp32 or wider.
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
