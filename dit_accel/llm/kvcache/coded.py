"""`coded_attention`: attention over tokens whose keys and values are codes, in torch."""

import math

from jaxtyping import Bool, Complex, Float, UInt8
from torch import Tensor

from dit_accel.kernels.lut_attention import turned_pairs
from dit_accel.llm.kvcache.partial import Partial, attention_part, from_scores
from dit_accel.llm.kvcache.quantizer import Quantizer

FEW = 8
"""Queries of a head of keys for which looking up their scores is faster on a CPU than decoding keys."""


def coded_attention(
    q: Float[Tensor, "b h g l_q d"],
    codes: tuple[UInt8[Tensor, "b h n bytes_k"], UInt8[Tensor, "b h n bytes_v"]],
    quantizers: tuple[Quantizer, Quantizer],
    *,
    scale: float,
    visible: Bool[Tensor, "b _h n"] | None = None,
    factors: Complex[Tensor, "b _hf n half"] | None = None,
) -> Partial:
    """Return attention, channels in order of the sub-vectors.

    Args:
        q: queries, channels in this order.
        codes: those of keys and of values.
        quantizers: those of keys and of values.
        scale: factor of the dot products.
        visible: keys that may be read. Default: all.
        factors: those of the rotation of keys, which are coded before RoPE. Default: they are coded after it.
    """
    k, v = quantizers
    values = v.rows(codes[1])
    if factors is not None:
        keys = k.rows(codes[0])
        if k.mean is not None:
            keys = keys + k.grouped(k.mean)[:, None]
        keys = turned_pairs(keys, factors)
        found = attention_part(q, keys, values, scale=scale, visible=visible)
        return with_means(found, q, None, v, scale)
    if q.shape[2] * q.shape[3] > FEW:
        found = attention_part(q, k.rows(codes[0]), values, scale=scale, visible=visible)
    else:
        scores = k.scores(q, codes[0]) * scale
        if visible is not None:
            scores = scores.masked_fill(~visible[:, :, None, None], -math.inf)
        found = from_scores(scores, values)
    return with_means(found, q, k, v, scale)


def with_means(
    found: Partial, q: Tensor, k: Quantizer | None, v: Quantizer, scale: float
) -> Partial:
    """Return attention over tokens with the means that their codes lack.

    Means of keys add the same to all scores of a query, and means of values the same to all outputs.

    Args:
        found: attention over tokens without means.
        q: queries, channels in order.
        k: codes of keys; None: these have their means.
        v: codes of values.
        scale: factor of the dot products.
    """
    o, lse = found
    if k is not None and k.mean is not None:
        lse = lse + scale * (q @ k.grouped(k.mean)[:, None, :, None])[..., 0]
    if v.mean is not None:
        o = o + v.grouped(v.mean)[:, None, None]
    return Partial(o, lse)
