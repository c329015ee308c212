"""Attention and mask functions that are registered with transformers under the name "dit_accel"."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from dit_accel.llm.dense import dense_attention
from dit_accel.llm.kvcache.layer import TAG, check_cached
from dit_accel.llm.names import NAME
from dit_accel.llm.padding import broadcast_mask, window_of, with_window

POLICY = "_dit_accel"
"""Name of the attribute of an attention module that holds the `Policy` of its model."""
UNKNOWN = ("position_bias", "s_aux")
"""Arguments that change the attention scores in ways that this module does not implement."""


def register() -> None:
    """Register both functions with transformers. Safe to call more than once.

    Without the mask function, transformers would pass None as the mask, and queries would attend to padding.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **more: Any,
) -> Tensor | None:
    """Return the mask of real (not padding) tokens `[B, Lk]` of the keys; None if all are real and there is no window.

    A mask that is shorter than the keys means that the remaining keys are not written yet (`StaticCache`). Layers with a
    sliding window get `[B, Lk, window]`, see `with_window`. Other kinds of visibility (chunked layers, packed sequences,
    bidirectional image tokens) get the mask of query-key pairs `[B, 1, Lq, Lk]` that transformers makes.
    """
    if attention_mask is not None and attention_mask.ndim == 3:
        return attention_mask  # made by this function: `generate` prepares masks for static caches
    pairs = not allow_is_causal_skip
    if local_size is not None and not pairs:
        # With one query the pair mask is small, and `is_window` would break torch.compile.
        pairs = q_length == 1 or not is_window(
            mask_function,
            local_size,
            batch_size=batch_size,
            last=int(q_offset) + q_length - 1,
            keys=range(kv_offset, kv_offset + kv_length),
            device=device,
        )
    if pairs:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            device=device,
            **more,
        )
    valid = int(q_offset) - kv_offset + q_length
    if attention_mask is not None:
        attention_mask = attention_mask[:, kv_offset : kv_offset + valid].bool()
        short = valid - attention_mask.shape[1]
        if short > 0:
            attention_mask = nn.functional.pad(attention_mask, (short, 0), value=True)
    if local_size is None and valid == kv_length:
        whole = attention_mask is None or bool(attention_mask.all())
        return None if whole else attention_mask
    if attention_mask is None:
        attention_mask = torch.ones(batch_size, valid, dtype=torch.bool, device=device)
    return attention_mask if local_size is None else with_window(attention_mask, local_size)


def is_window(
    mask_function: Callable[..., Any],
    window: int,
    *,
    batch_size: int,
    last: int,
    keys: range,
    device: torch.device | str = "cpu",
) -> bool:
    """Return whether a mask function of transformers is a causal sliding window. Synchronizes with the device.

    transformers passes `local_size` both for windows and for chunks (Llama 4), where a query sees the keys from the start
    of its chunk. Checking the last two queries is enough: both of them see the same keys in a window and in a chunk only
    if neither hides any earlier key.

    Args:
        mask_function: function of (row, head, query, key) that is True where the pair is visible.
        window: number of keys that each query sees.
        batch_size: number of rows.
        last: position of the last query.
        keys: positions of the keys.
    """
    row = torch.arange(batch_size, device=device)[:, None, None, None]
    query = torch.arange(max(0, last - 1), last + 1, device=device)[:, None]
    key = torch.arange(keys.start, keys.stop, device=device)
    found = mask_function(row, torch.zeros_like(row), query, key)
    return bool((found == ((key <= query) & (key > query - window))).all())


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Compute attention with the policy of the module, or dense attention if the module has none.

    Args:
        module: attention layer of a transformers model.
        query: queries `[B, Hq, Lq, D]` at the last positions.
        key, value: keys and values `[B, Hkv, Lk, D]`.
        attention_mask: output of `padding_mask`, or a mask of query-key pairs that the user passed.
        scaling: factor of the dot products. Default: `D ** -0.5`.
        dropout, softcap: see `dense_attention`.
        sliding_window: number of keys that each query sees.
        is_causal: overrides the attribute `is_causal` of the module.

    Returns:
        The attention output `[B, Lq, Hq, D]`, and None in place of attention weights.

    Raises:
        ValueError: `output_attentions` is True, or an argument is not supported.
    """
    if more.get("output_attentions"):
        raise ValueError(
            "output_attentions=True: must be False, because dit_accel does not compute attention weights; to get them, "
            "call disable(model) and use attn_implementation='eager'"
        )
    for name in UNKNOWN:
        if more.get(name) is not None:
            raise ValueError(
                f"{name}: must be None, but {type(module).__name__} passes it; models that add {name} to their attention "
                "scores are not supported"
            )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    rules = _Rules(scale, causal, sliding_window, softcap, dropout)
    layer = getattr(key, TAG, None)
    if layer is None:
        out = _attend(module, query, key, value, attention_mask, rules)
    else:
        layer.pending = False  # so that an error below leaves the cache unchanged
        check_cached(attention_mask, causal=causal, softcap=softcap, dropout=dropout)
        policy = getattr(module, POLICY, None)
        if policy is not None and layer.get_seq_length():
            policy.counts[module.layer_idx].cached += 1
        out = layer.attend(
            query,
            key,
            value,
            attention_mask,
            scale=scale,
            prompt=lambda: _attend(module, query, key, value, attention_mask, rules),
        )
    return out.transpose(1, 2).contiguous(), None


class _Rules(NamedTuple):
    """Scale, causality, window, soft cap and dropout of an attention call."""

    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    dropout: float


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rules: _Rules
) -> Tensor:
    """Return the attention `[B, Hq, Lq, D]` of queries at the last positions of the keys."""
    scale, causal, window, softcap, dropout = rules
    window = window_of(mask) or window
    if mask is not None and mask.ndim < 4:
        k, v = k[:, :, : mask.shape[1]], v[:, :, : mask.shape[1]]
    elif mask is not None:
        k, v = k[:, :, : mask.shape[-1]], v[:, :, : mask.shape[-1]]
        if mask.dtype != torch.bool:
            mask = mask >= 0  # an additive mask is 0 where a pair is visible
        causal = False  # the mask already contains causality
    policy = getattr(module, POLICY, None)
    if policy is None:
        return dense_attention(
            q,
            k,
            v,
            scale=scale,
            causal=causal,
            mask=broadcast_mask(mask),
            window=None if mask is not None and mask.ndim == 4 else window,
            softcap=softcap,
            dropout=dropout,
        )
    out: Tensor = policy.attend(
        module.layer_idx,
        q,
        k,
        v,
        mask,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        dropout=dropout,
    )
    return out
