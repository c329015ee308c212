"""Attention over chosen tokens of a store, some query positions at a time."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dit_accel.llm.kvcache.partial import Partial, attention_part, merged_part
from dit_accel.llm.kvcache.store import Store

GATHERED = 2**24
"""Elements of gathered keys that exist at a time: 64 MiB in fp32."""
MANY = 16
"""Query positions from which reading all tokens under a mask may be faster than gathering those of each position."""
DENSE = 8
"""Tokens over chosen ones up to which it is: a product with a key is so much cheaper than a copy of it."""
MASK = 2**26
"""Entries of a mask that exist at a time."""


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
    if length >= MANY and store.slots <= DENSE * count:
        return _masked(store, q, index, visible, scale)
    step = max(1, GATHERED // max(1, rows * heads * count * q.shape[-1]))
    if step >= length:
        return store.attend_at(q, index, visible, scale)
    parts = []
    for start in range(0, length, step):
        at = slice(start, start + step)
        seen = None if visible is None else visible[:, :, at]
        parts.append(store.attend_at(q[:, :, :, at], index[:, :, at], seen, scale))
    return Partial(torch.cat([x.o for x in parts], 3), torch.cat([x.lse for x in parts], 3))


def _masked(
    store: Store, q: Tensor, index: Tensor, visible: Tensor | None, scale: float
) -> Partial:
    """Return the same by attention over all tokens, of which each position sees those that were chosen for it."""
    rows, heads, length, _ = index.shape
    step = max(1, MASK // max(1, rows * heads * store.slots))
    found = []
    for start in range(0, length, step):
        some, chosen = q[:, :, :, start : start + step], index[:, :, start : start + step]
        # One more slot takes the entries that do not count.
        mask = torch.zeros(*chosen.shape[:3], store.slots + 1, dtype=torch.bool, device=q.device)
        if visible is not None:
            chosen = chosen.masked_fill(~visible[:, :, start : start + step], store.slots)
        mask.scatter_(3, chosen, True)
        if (stored := store.stored_heads()) is not None:
            mask &= stored.to(q.device)[:, None, None]
        parts, first = [], 0
        for part in store.parts:
            for piece in store.pieces(some, part):
                k, v = store.decode(piece.to(q.device).tensors)
                seen = mask[..., first : first + piece.slots]
                if piece.valid is not None:
                    seen = seen & piece.valid[:, :, None].to(q.device)
                parts.append(attention_part(some, k, v, scale=scale, visible=seen))
                first += piece.slots
        found.append(merged_part(parts))
    return Partial(torch.cat([x.o for x in found], 3), torch.cat([x.lse for x in found], 3))
