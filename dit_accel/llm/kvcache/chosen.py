"""Attention over selected tokens of a store, in chunks of query positions to limit memory."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dit_accel.llm.kvcache.partial import Partial, attention_part, merged_part
from dit_accel.llm.kvcache.store import Store

GATHERED = 2**24
"""Largest number of gathered key elements in memory: 64 MiB in fp32."""
MANY = 16
"""Number of query positions from which masked attention over all tokens may be faster than gathering tokens."""
DENSE = 8
"""Largest ratio of stored to selected tokens for which masked attention is used. A dot product with a key is about this
many times cheaper than copying the key."""
MASK = 2**26
"""Largest number of mask entries in memory."""


def attend_chosen(
    store: Store,
    q: Float[Tensor, "b h g l_q d"],
    index: Int[Tensor, "b h l_q n"],
    visible: Bool[Tensor, "b h l_q n"] | None,
    scale: float,
) -> Partial:
    """Return attention over the slots in `index`, which differ between query positions.

    Args:
        store: store that holds the tokens.
        q: queries, grouped by KV head.
        index: slots to read.
        visible: False for entries of `index` to ignore. Default: all are used.
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
    """Return the same result from attention over all tokens with a mask of the selected ones."""
    rows, heads, length, _ = index.shape
    step = max(1, MASK // max(1, rows * heads * store.slots))
    found = []
    for start in range(0, length, step):
        some, chosen = q[:, :, :, start : start + step], index[:, :, start : start + step]
        # An additional slot collects the entries to ignore.
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
