"""`SparseProcessor`: what the attention processors of all families share."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class SparseProcessor:
    """An attention processor that stands in for one of diffusers, `stock`.

    It has three seams, None at first; without them it computes what `stock` computes. See `Family.processor`.
    """

    attend: Any = None
    kv_store: Any = None
    exchange: Any = None
    text: tuple[Tensor, ...] | None = None
    """Cross-attention only: keys and values of the text, computed before."""

    def __init__(self, stock: Any = None) -> None:
        # diffusers' loaders of IP-Adapters call the class of the processor that is there.
        if stock is None:
            raise ValueError(
                f"{type(self).__name__}: new attention processors, as load_ip_adapter and unload_ip_adapter make, do not "
                "work while acceleration is on; disable() first"
            )
        self.stock = stock

    def release(self) -> Any:
        """Let go of the seams, so that a copy that somebody kept is harmless; returns `stock`."""
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
        words: int = 0,
        masked: bool = False,
        text_lengths: Tensor | None = None,
        padding: Tensor | None = None,
        scale: float | None = None,
        base_length: int | None = None,
    ) -> Float[Tensor, "b l h d"]:
        """Self-attention through the seams.

        Args:
            query, key, value: of the tokens that run in this process, rotated.
            dense: attention `(q, k, v, scale=...) -> o`, all `[B, L, H, D]`, for calls that `attend` leaves to it. It
                gets the keys of all tokens.
            text: where text stands in the sequence: "none", "first" or "last".
            words: text tokens among these that are no part of the layout that `kv_store` knows.
            masked: whether keys are hidden in some rows, otherwise than `text_lengths` or `padding` says.
            text_lengths: `[B]`, text tokens of each row that count; those behind them, up to the length of the text,
                are padding. Default: all do.
            padding: `[B]`, tokens at the end of each row that do not count, where rows are [text, image, padding].
                Default: none.
            scale: default `D ** -0.5`.
            base_length: sequence length of training: the scale grows with the length of the keys over it
                ("proportional attention" of the Luminas). It needs a `scale`. Default: it does not.
        """
        heads = query.shape[2], key.shape[2]
        if self.exchange is not None:
            query, key, value = self.exchange.to_heads(query, key, value, text)
            words = self.exchange.beside(text)
        if self.kv_store is not None:
            key, value = self._stored(key, value, text, words)
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

    def _stored(self, key: Tensor, value: Tensor, text: str, words: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens; text beside the stored layout stays as it is."""
        if not words:
            return self.kv_store(key, value)
        sizes = [words, key.shape[1] - words]
        at = 0 if text == "first" else 1
        (k, v) = (list(x.split(sizes if at == 0 else sizes[::-1], dim=1)) for x in (key, value))
        k[1 - at], v[1 - at] = self.kv_store(k[1 - at], v[1 - at])
        return torch.cat(k, dim=1), torch.cat(v, dim=1)


def computed_once(attn: Any, compute: Callable[..., Any], text: Tensor) -> Any:
    """`compute(attn, text)`; None where the weights are elsewhere (block-wise offloading): then the
    processor has to compute it in each call."""
    return compute(attn, text) if next(attn.parameters()).device == text.device else None


def grouped_attention(
    query: Float[Tensor, "b l h d"],
    key: Float[Tensor, "b m h_kv d"],
    value: Float[Tensor, "b m h_kv d"],
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b l h d"]:
    """Dense attention; `mask` `[B, M]` is true (or 1) for keys that count."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    mask = None if mask is None else mask.bool()[:, None, None]
    # Grouped heads are repeated as diffusers does: SDPA's own grouping is slower with a mask.
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).to(query.dtype)


def projections(attn: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of self-attention, fused or not."""
    if getattr(attn, "fused_projections", False):
        return attn.to_qkv(hidden_states).chunk(3, dim=-1)
    return attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)


def text_projections(attn: Any, text: Tensor) -> list[Tensor]:
    """Query, key and value `[B, L, H, D]` of the text in joint attention, fused or not, normalised."""
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
