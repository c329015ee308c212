"""`SparseProcessor`: base class of the attention processors of all families."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class SparseProcessor:
    """Attention processor that replaces `stock`, a processor of diffusers.

    It has three seams, see `Family.processor`. While they are None, it computes the same as `stock`.
    """

    attend: Any = None
    kv_store: Any = None
    exchange: Any = None
    text: tuple[Tensor, ...] | None = None
    """Keys and values of the text, computed once; for cross-attention only."""

    def __init__(self, stock: Any = None) -> None:
        # load_ip_adapter of diffusers instantiates the class of the present processor without arguments.
        if stock is None:
            raise ValueError(
                f"{type(self).__name__}: new attention processors, as load_ip_adapter and unload_ip_adapter make, do not "
                "work while acceleration is on; disable() first"
            )
        self.stock = stock

    def release(self) -> Any:
        """Clear the seams, so that references to this processor keep nothing alive. Return `stock`."""
        self.attend = self.kv_store = self.exchange = self.text = None
        return self.stock

    def run(
        self,
        query: Float[Tensor, "b l h d"],
        key: Float[Tensor, "b l h_kv d"],
        value: Float[Tensor, "b l h_kv d"],
        dense: Callable[..., Tensor],
        *,
        text: str = "none",
        text_tokens: int = 0,
        masked: bool = False,
        text_lengths: Tensor | None = None,
        padding: Tensor | None = None,
        scale: float | None = None,
        base_length: int | None = None,
    ) -> Float[Tensor, "b l h d"]:
        """Compute self-attention through the seams.

        Args:
            query, key, value: projections of the tokens that run in this process, rotated.
            dense: attention `(q, k, v, scale=...) -> o`, all `[B, L, H, D]`, for calls that `attend` does not answer. It
                gets the keys of all tokens.
            text: position of the text in the sequence: "none", "first" or "last".
            text_tokens: number of text tokens in the sequence that `kv_store` does not store.
            masked: whether keys are masked in another way than by `text_lengths` or `padding`.
            text_lengths: `[B]`, number of text tokens of each row without padding at the end of the text. Default: no
                padding.
            padding: `[B]`, number of padding tokens at the end of each row, if rows are [text, image, padding].
                Default: none.
            scale: factor of the dot products. Default: `D ** -0.5`.
            base_length: sequence length of training; the scale grows with log(number of keys) / log(base_length)
                ("proportional attention" of the Lumina models). Needs `scale`. Default: the scale does not grow.
        """
        heads = query.shape[2], key.shape[2]
        if self.exchange is not None:
            query, key, value = self.exchange.to_heads(query, key, value, text)
            text_tokens = self.exchange.text_tokens_in(text)
        if self.kv_store is not None:
            key, value = self._stored(key, value, text, text_tokens)
        if base_length is not None:
            assert scale is not None
            scale *= math.sqrt(math.log(key.shape[1], base_length))
        out = None
        if self.attend is not None:
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            out = self.attend(
                q,
                k,
                v,
                text=text,
                text_lengths=text_lengths,
                padding=padding,
                masked=masked,
                scale=scale,
            )
        if out is None:
            out = dense(query, key, value, scale=scale)
        else:
            out = out.transpose(1, 2).to(query.dtype)
        return out if self.exchange is None else self.exchange.to_tokens(out, heads, text)

    def _stored(
        self, key: Tensor, value: Tensor, text: str, text_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all tokens. Text tokens that are not stored pass through."""
        if not text_tokens:
            return self.kv_store(key, value)
        sizes = [text_tokens, key.shape[1] - text_tokens]
        at = 0 if text == "first" else 1
        (k, v) = (list(x.split(sizes if at == 0 else sizes[::-1], dim=1)) for x in (key, value))
        k[1 - at], v[1 - at] = self.kv_store(k[1 - at], v[1 - at])
        return torch.cat(k, dim=1), torch.cat(v, dim=1)


def computed_once(attn: Any, compute: Callable[..., Any], text: Tensor) -> Any:
    """Return `compute(attn, text)`.

    None if the weights of `attn` are on another device than the text (block-wise offloading). The processor then
    computes the value in each call.
    """
    return compute(attn, text) if next(attn.parameters()).device == text.device else None


def grouped_attention(
    query: Float[Tensor, "b l h d"],
    key: Float[Tensor, "b m h_kv d"],
    value: Float[Tensor, "b m h_kv d"],
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b l h d"]:
    """Compute dense attention with grouped heads; `mask` `[B, M]` is true (or 1) for keys that are read."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    mask = None if mask is None else mask.bool()[:, None, None]
    # Heads of keys are repeated, as in diffusers: enable_gqa of SDPA is slower with a mask.
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).to(query.dtype)


def projections(attn: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value of self-attention from fused or separate projections."""
    if getattr(attn, "fused_projections", False):
        return attn.to_qkv(hidden_states).chunk(3, dim=-1)
    return attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)


def head_projections(attn: Any, hidden_states: Tensor) -> list[Tensor]:
    """Return normalised query, key and value `[B, L, H, D]` of self-attention, for norms that work on single heads."""
    query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in projections(attn, hidden_states))
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return [query, key, value]


def text_projections(attn: Any, text: Tensor) -> list[Tensor]:
    """Return normalised query, key and value `[B, L, H, D]` of the text in joint attention."""
    if getattr(attn, "fused_projections", False):
        projected = attn.to_added_qkv(text).chunk(3, dim=-1)
    else:
        projected = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
    query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in projected)
    if attn.norm_added_q is not None:
        query = attn.norm_added_q(query)
    if attn.norm_added_k is not None:
        key = attn.norm_added_k(key)
    return [query, key, value]
