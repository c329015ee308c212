"""`dense_attention`: exact attention for causal language models, with padding, offsets, windows and soft caps."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

CHUNK_SCORES = 2**24
"""Largest number of scores (or mask entries) that a chunk of queries may need: 64 MiB in fp32."""
WINDOW_ROWS = 256
"""Smallest number of queries per chunk with a sliding window, chosen by measurement on a CPU."""


def dense_attention(
    q: Float[Tensor, "b h_q l_q d"],
    k: Float[Tensor, "b h_kv l_k d"],
    v: Float[Tensor, "b h_kv l_k d_v"],
    *,
    scale: float,
    causal: bool = True,
    mask: Bool[Tensor, "b _h _l_q l_k"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "b h_q l_q d_v"]:
    """Return softmax attention over all visible keys.

    With a window, the cost grows with the window and not with `Lk`: each chunk of queries skips the keys that none of its
    queries sees.

    Args:
        q: queries `[B, Hq, Lq, D]` at the last Lq of the Lk positions.
        k, v: keys and values `[B, Hkv, Lk, D]`; `Hq` is a multiple of `Hkv`.
        scale: factor of the dot products.
        causal: query i sees keys up to `i + Lk - Lq`.
        mask: True for visible pairs, combined with the causal mask. A query that sees no key gets the mean of the values.
        window: number of keys that a query sees, counted back from its own position; needs `causal`. Default: all.
        softcap: c in `c * tanh(score / c)`. Default: no soft cap.
        dropout: dropout probability of the attention weights.
    """
    q_len, kv_len = q.shape[2], k.shape[2]
    if window is not None and window >= kv_len:
        window = None
    plain = softcap is None and mask is None and window is None
    if plain and (not causal or q_len in (1, kv_len)):
        return scaled_dot_product_attention(
            q, k, v, is_causal=causal and q_len > 1, scale=scale, dropout_p=dropout, enable_gqa=True
        )
    heads = q.shape[1] if softcap is not None else 1
    step = max(1, CHUNK_SCORES // (q.shape[0] * heads * kv_len))
    if window is not None:
        step = min(step, max(WINDOW_ROWS, window // 8))
    out = []
    for start in range(0, q_len, step):
        rows = slice(start, min(start + step, q_len))
        keys = _keys(rows, kv_len - q_len, kv_len, causal, window)
        visible = _visible(rows, keys, kv_len - q_len, causal, window, mask, q.device)
        if softcap is not None:
            some = q[:, :, rows], k[:, :, keys], v[:, :, keys]
            out.append(_capped(*some, visible, scale, softcap, dropout))
            continue
        out.append(
            scaled_dot_product_attention(
                q[:, :, rows],
                k[:, :, keys],
                v[:, :, keys],
                attn_mask=visible,
                scale=scale,
                dropout_p=dropout,
                enable_gqa=True,
            )
        )
    return torch.cat(out, 2)


def _keys(rows: slice, offset: int, kv_len: int, causal: bool, window: int | None) -> slice:
    """Return the range of keys that at least one of the queries in `rows` sees."""
    if not causal:
        return slice(0, kv_len)
    first = 0 if window is None else max(0, rows.start + offset - window + 1)
    return slice(first, rows.stop + offset)


def _visible(
    rows: slice,
    keys: slice,
    offset: int,
    causal: bool,
    window: int | None,
    mask: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Return the mask of visible pairs of the queries in `rows` and the keys in `keys`; None if all are visible."""
    visible = None
    if causal:
        last = torch.arange(rows.start, rows.stop, device=device)[:, None] + offset
        at = torch.arange(keys.start, keys.stop, device=device)
        visible = at <= last
        if window is not None:
            visible = visible & (at > last - window)
        visible = visible[None, None]
    if mask is not None:
        some = mask if mask.shape[2] == 1 else mask[:, :, rows]
        some = some[..., keys]
        visible = some if visible is None else visible & some
    if visible is None:
        return None
    return visible | ~visible.any(-1, keepdim=True)


def _capped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    scale: float,
    softcap: float,
    dropout: float,
) -> Tensor:
    group = q.shape[1] // k.shape[1]
    scores = q.unflatten(1, (-1, group)) @ k[:, :, None].mT
    scores = softcap * torch.tanh(scores.float() * (scale / softcap))
    if visible is not None:
        scores = scores.masked_fill(~visible[:, :, None], -math.inf)
    weights = torch.softmax(scores, -1).to(v.dtype)
    weights = torch.nn.functional.dropout(weights, dropout, training=dropout > 0)
    return (weights @ v[:, :, None]).flatten(1, 2)
