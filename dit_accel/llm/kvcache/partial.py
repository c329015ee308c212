"""Attention over a subset of the keys, with the log-sum-exp that is needed to merge it with other subsets."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dit_accel.kernels import merge_lse

SCORES = 2**24
"""Largest number of scores in memory: 64 MiB in fp32."""


class Partial(NamedTuple):
    """Attention output over a subset of the keys."""

    o: Float[Tensor, "b h_kv g l_q d_v"]
    lse: Float[Tensor, "b h_kv g l_q"]
    """Natural log of the sum of exponentials of the scores; -inf for a query without a visible key."""


def grouped(q: Float[Tensor, "b h_q l_q d"], kv_heads: int) -> Float[Tensor, "b h_kv g l_q d"]:
    """Return queries grouped by the KV head that they read."""
    return q.unflatten(1, (kv_heads, -1))


def attention_part(
    q: Float[Tensor, "b h g l_q d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d_v"],
    *,
    scale: float,
    visible: Bool[Tensor, "b _h n"] | Bool[Tensor, "b h l_q n"] | None = None,
    causal: bool = False,
) -> Partial:
    """Return softmax attention over the given keys, in chunks of queries to limit memory.

    Args:
        q: queries, grouped by KV head.
        k, v: keys and values.
        scale: factor of the dot products.
        visible: True for keys that may be read, shared by all queries or per query position. Default: all.
        causal: the queries are at the last positions of the keys, and do not read later keys.
    """
    length, keys = q.shape[3], k.shape[2]
    step = max(1, SCORES // max(1, q.shape[0] * q.shape[1] * q.shape[2] * keys))
    parts = []
    for start in range(0, length, step):
        rows = q[:, :, :, start : start + step]
        scores = (rows.flatten(2, 3) @ k.mT).unflatten(2, rows.shape[2:4]).float() * scale
        if visible is not None:
            some = visible[:, :, None] if visible.ndim == 3 else visible[:, :, start : start + step]
            scores = scores.masked_fill(~some[:, :, None], -math.inf)
        if causal and length > 1:
            last = torch.arange(start, start + rows.shape[3], device=k.device) + keys - length
            after = torch.arange(keys, device=k.device) > last[:, None]
            scores = scores.masked_fill(after, -math.inf)
        parts.append(from_scores(scores, v))
    if len(parts) == 1:
        return parts[0]
    return Partial(torch.cat([x.o for x in parts], 3), torch.cat([x.lse for x in parts], 3))


def from_scores(scores: Float[Tensor, "b h g l_q n"], v: Float[Tensor, "b h n d_v"]) -> Partial:
    """Return attention with given scores, which are -inf for keys that are not read."""
    if not scores.shape[-1]:
        shape = scores.shape[:-1]
        return Partial(v.new_zeros(*shape, v.shape[-1]), scores.new_full(shape, -math.inf))
    # On a CPU several times faster than `logsumexp` followed by a second pass of exponentials.
    info = torch.finfo(scores.dtype)
    top = scores.detach().amax(-1, keepdim=True).clamp(min=info.min)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    weights = (weights / total.clamp(min=info.tiny)).to(v.dtype)
    o = (weights.flatten(2, 3) @ v).unflatten(2, scores.shape[2:4])
    return Partial(o, (top + total.log())[..., 0])


def by_query(
    q: Float[Tensor, "b h g l_q d"],
    k: Float[Tensor, "b h l_q n d"],
    v: Float[Tensor, "b h l_q n d_v"],
    *,
    scale: float,
    visible: Bool[Tensor, "b h l_q n"] | None = None,
) -> Partial:
    """Return attention in which each query position has different keys. Arguments as in `attention_part`."""
    heads, length = q.shape[1], q.shape[3]
    found = attention_part(
        q.transpose(2, 3).flatten(1, 2)[:, :, :, None],
        k.flatten(1, 2),
        v.flatten(1, 2),
        scale=scale,
        visible=None if visible is None else visible.flatten(1, 2),
    )
    o = found.o[:, :, :, 0].unflatten(1, (heads, length)).transpose(2, 3)
    return Partial(o, found.lse[..., 0].unflatten(1, (heads, length)).transpose(2, 3))


def merged(parts: Iterable[Partial]) -> Float[Tensor, "b h_q l_q d_v"]:
    """Merge the attention over disjoint sets of keys into the full attention output."""
    return merge_lse(*((x.o.flatten(1, 2), x.lse.flatten(1, 2)) for x in parts))[0]


def merged_part(parts: Iterable[Partial]) -> Partial:
    """Merge the attention over disjoint sets of keys into one `Partial`."""
    each = list(parts)
    if len(each) == 1:
        return each[0]
    heads = each[0].o.shape[1:3]
    o, lse = merge_lse(*((x.o.flatten(1, 2), x.lse.flatten(1, 2)) for x in each))
    return Partial(o.unflatten(1, heads), lse.unflatten(1, heads))
