"""Attention over chosen tokens of a store, some query positions at a time."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dit_accel.llm.kvcache.partial import Partial
from dit_accel.llm.kvcache.store import Store

GATHERED = 2**24
"""Elements of gathered keys that exist at a time: 64 MiB in fp32."""


def attend_chosen(
    store: Store,
    q: Float[Tensor, "b h g l_q d"],
    index: Int[Tensor, "b h l_q n"],
    visible: Bool[Tensor, "b h l_q n"] | None,
    scale: float,
) -> Partial:
    """Return attention over the slots at `index`; each query position has slots of its own.

    Args:
        store: the stored tokens.
        q: queries by the head of keys that they read.
        index: slots that are read.
        visible: entries of `index` that count. Default: all.
        scale: factor of the dot products.
    """
    rows, heads, length, count = index.shape
    step = max(1, GATHERED // max(1, rows * heads * count * q.shape[-1]))
    if step >= length:
        return store.attend_at(q, index, visible, scale)
    parts = []
    for start in range(0, length, step):
        at = slice(start, start + step)
        seen = None if visible is None else visible[:, :, at]
        parts.append(store.attend_at(q[:, :, :, at], index[:, :, at], seen, scale))
    return Partial(torch.cat([x.o for x in parts], 3), torch.cat([x.lse for x in parts], 3))
