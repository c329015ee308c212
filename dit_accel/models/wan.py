"""Wan2.1 (`WanTransformer3DModel`): facts, and its attention processor."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

NAME = "Wan2.1"
STOCK_PROCESSORS = ("WanAttnProcessor",)


def self_attention(transformer: Any) -> dict[str, Any]:
    """The self-attention modules by name, in layer order."""
    return {f"blocks.{i}.attn1": block.attn1 for i, block in enumerate(transformer.blocks)}


def call_inputs(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """`hidden_states` and `encoder_hidden_states` of a transformer call."""
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    context = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]
    return hidden_states, context


def token_grid(transformer: Any, hidden_states: Float[Tensor, "b c t h w"]) -> tuple[int, int, int]:
    """Tokens (t, h, w); they lie in raster order, w fastest."""
    t, h, w = (
        n // p for n, p in zip(hidden_states.shape[2:], transformer.config.patch_size, strict=True)
    )
    return t, h, w


class WanSparseAttnProcessor:
    """Self-attention with a seam: `attend` may answer; otherwise diffusers' dense attention runs.

    Args:
        attend: `(layer, q, k, v, masked=...) -> o | None`, all `[B, H, L, D]`.
        layer: index of the block.
        stock: the processor this one stands in for; its attention backend is honoured.
    """

    def __init__(self, attend: Any, layer: int, stock: Any) -> None:
        self.attend = attend
        self.layer = layer
        self.stock = stock
        # diffusers' set_attention_backend and enable_parallelism look for these two.
        self._attention_backend = stock._attention_backend
        self._parallel_config = stock._parallel_config

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b l c"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "b l c"]:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        if self._parallel_config is not None:
            raise RuntimeError(
                "context parallelism splits the tokens that a sparse plan needs: disable() first"
            )
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = (
                attn.to_q(hidden_states),
                attn.to_k(hidden_states),
                attn.to_v(hidden_states),
            )
        query, key = attn.norm_q(query), attn.norm_k(key)  # across heads, hence before the split
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        if rotary_emb is not None:
            query, key = rotate(query, *rotary_emb), rotate(key, *rotary_emb)
        out = self.attend(
            self.layer,
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            masked=attention_mask is not None,
        )
        if out is not None:
            out = out.transpose(1, 2)
        else:
            out = dispatch_attention_fn(
                query, key, value, attn_mask=attention_mask, backend=self._attention_backend
            )
        out = out.flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](out))


def rotate(
    x: Float[Tensor, "b l h d"], cos: Float[Tensor, "1 l 1 d"], sin: Float[Tensor, "1 l 1 d"]
) -> Float[Tensor, "b l h d"]:
    """Wan's rotary embedding: neighbouring channels form the rotated pairs."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return (
        torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)
    )
