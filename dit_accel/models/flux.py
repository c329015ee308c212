"""FLUX.1 (`FluxTransformer2DModel`): facts, and the attention processor of both kinds of blocks."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dit_accel.models.attention import head_projections, text_projections
from dit_accel.models.call import Call
from dit_accel.models.family import AttentionLayer
from dit_accel.models.hooks import Hook, after
from dit_accel.models.packed import (
    PackedProcessor,
    PackedTransformer,
    image_part,
    set_text_tokens,
    text_part,
)
from dit_accel.models.rotary import for_heads, rotate
from dit_accel.models.selection import TokenSelection
from dit_accel.models.tokens import read_once

REFUSED = {
    "ip_adapter_image_embeds": "IP-Adapter does not work with acceleration",
    "attention_mask": "masks of joint attention do not work with acceleration",
}


class Flux(PackedTransformer):
    """FLUX.1, Kontext, Fill and Control: blocks with two streams, then blocks with one."""

    name = "FLUX.1"
    stock_processors = ("FluxAttnProcessor",)
    residuals = ("controlnet_block_samples", "controlnet_single_block_samples")

    def self_attention(self, transformer: Any) -> dict[str, AttentionLayer]:
        return {
            f"{group}.{i}.attn": AttentionLayer(block.attn, block.attn.heads, block.attn.head_dim)
            for group in ("transformer_blocks", "single_transformer_blocks")
            for i, block in enumerate(getattr(transformer, group))
        }

    def processor(self, stock: Any) -> Any:
        return FluxSparseAttnProcessor(stock)

    def call(self, transformer: Any, arguments: dict[str, Any]) -> Call:
        for name in arguments.get("joint_attention_kwargs") or {}:
            if name in REFUSED:
                raise ValueError(f"{name}: {REFUSED[name]}; disable() first")
        grid = read_once(arguments["img_ids"], _image_grid)
        return self.packed_call(transformer, arguments, grid)

    def hooks(self, transformer: Any, selection: TokenSelection) -> list[Hook]:
        layers = [x.module for x in self.self_attention(transformer).values()]
        return [
            *self.packed_hooks(
                transformer, selection, transformer.x_embedder, transformer.context_embedder
            ),
            after(transformer.pos_embed, _tables, selection, layers),
        ]


def _image_grid(ids: Tensor) -> tuple[int, int, int]:
    """Return the number of image tokens along (t, h, w).

    Args:
        ids: position of each token as (image, row, column), `[N, 3]` or `[1, N, 3]`.

    Raises:
        ValueError: the positions do not belong to one image, followed by reference images.
    """
    image, row, _ = (ids[0] if ids.ndim == 3 else ids).unbind(1)
    own = image == image[0]
    width = (own & (row == row[0])).sum()
    tokens, width = torch.stack([own.sum(), width]).tolist()
    if tokens % width or not bool(own[:tokens].all()):
        raise ValueError(
            f"img_ids: {tokens} of {len(own)} positions belong to the first image, {width} of them to its first row; "
            "accepted are whole rows of one image, followed by reference images"
        )
    return 1, tokens // width, width


def _tables(
    selection: TokenSelection, layers: list[Any], output: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the rotary tables `[R or 1, L, D]` of the tokens that run."""
    text = selection.call.text_length - selection.call.references
    set_text_tokens(selection, layers, output[0])
    cos, sin = (
        _joined(text_part(selection, x[None, :text]), image_part(selection, x[None, text:]))
        for x in output
    )
    return cos, sin


def _joined(text: Tensor, image: Tensor) -> Tensor:
    return torch.cat([text.expand(len(image), -1, -1), image], dim=1)


class FluxSparseAttnProcessor(PackedProcessor):
    """Processor of attention over [text, image], in blocks with two streams or with one."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b l c"],
        encoder_hidden_states: Float[Tensor, "b t c"] | None = None,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        query, key, value = head_projections(attn, hidden_states)
        if encoder_hidden_states is not None:
            text = text_projections(attn, encoder_hidden_states)
            query, key, value = (
                torch.cat([t, x], dim=1) for x, t in zip((query, key, value), text, strict=True)
            )
        if image_rotary_emb is not None:
            cos, sin = (for_heads(x) for x in image_rotary_emb)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        out = self.run(
            query, key, value, self.dense, text="first", text_tokens=self.num_text_tokens
        )
        out = out.flatten(2).to(query.dtype)
        if encoder_hidden_states is None:
            return out  # the block has one projection for attention and feed-forward
        length = encoder_hidden_states.shape[1]
        image = attn.to_out[1](attn.to_out[0](out[:, length:]))
        return image, attn.to_add_out(out[:, :length])
