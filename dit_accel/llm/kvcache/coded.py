"""`coded_attention`: attention over tokens whose keys and values are codes, in torch."""

import math

from jaxtyping import Bool, Float, UInt8
from torch import Tensor

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
) -> Partial:
    """Return attention without means, channels in order of the sub-vectors.

    Args:
        q: queries, channels in this order.
        codes: those of keys and of values.
        quantizers: those of keys and of values.
        scale: factor of the dot products.
        visible: keys that may be read. Default: all.
    """
    k, v = quantizers
    values = v.rows(codes[1])
    if q.shape[2] * q.shape[3] > FEW:
        return attention_part(q, k.rows(codes[0]), values, scale=scale, visible=visible)
    scores = k.scores(q, codes[0]) * scale
    if visible is not None:
        scores = scores.masked_fill(~visible[:, :, None, None], -math.inf)
    return from_scores(scores, values)
