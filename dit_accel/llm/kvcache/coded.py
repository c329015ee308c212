"""`coded_attention`: PyTorch attention over product-quantised keys and values."""

import math

from jaxtyping import Bool, Complex, Float, UInt8
from torch import Tensor

from dit_accel.kernels.lut_attention import turned_pairs
from dit_accel.llm.kvcache.partial import Partial, attention_part, from_scores
from dit_accel.llm.kvcache.quantizer import Quantizer

FEW = 8
"""Largest number of queries per KV head for which score lookup tables are faster than decoding the keys, on a CPU."""


def coded_attention(
    q: Float[Tensor, "b h g l_q d"],
    codes: tuple[UInt8[Tensor, "b h n bytes_k"], UInt8[Tensor, "b h n bytes_v"]],
    quantizers: tuple[Quantizer, Quantizer],
    *,
    scale: float,
    visible: Bool[Tensor, "b _h n"] | None = None,
    factors: Complex[Tensor, "b _hf n half"] | None = None,
) -> Partial:
    """Return attention over coded tokens. Channels of inputs and outputs are in the order of the sub-vectors.

    Args:
        q: queries.
        codes: codes of keys and of values.
        quantizers: quantizers of keys and of values.
        scale: factor of the dot products.
        visible: True for keys that may be read. Default: all.
        factors: rotation factors for keys coded before RoPE. Default: keys are coded after RoPE.
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
    """Correct attention over codes for the means that were subtracted before coding.

    The mean key adds the same number to all scores of a query, and the mean value the same vector to all outputs.

    Args:
        found: attention over tokens without means.
        q: queries, channels in the order of the sub-vectors.
        k: quantizer of keys; None if the mean is already in the keys.
        v: quantizer of values.
        scale: factor of the dot products.
    """
    o, lse = found
    if k is not None and k.mean is not None:
        lse = lse + scale * (q @ k.grouped(k.mean)[:, None, :, None])[..., 0]
    if v.mean is not None:
        o = o + v.grouped(v.mean)[:, None, None]
    return Partial(o, lse)
