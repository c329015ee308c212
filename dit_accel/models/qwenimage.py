"""Qwen-Image (`QwenImageTransformer2DModel`): facts, and the joint attention processor."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dit_accel.models.attention import head_projections, text_projections
from dit_accel.models.call import Call
from dit_accel.models.family import AttentionLayer
from dit_accel.models.hooks import Hook, after, before
from dit_accel.models.packed import (
    PackedProcessor,
    PackedTransformer,
    image_part,
    set_text_tokens,
    text_part,
)
from dit_accel.models.rotary import for_heads, rotate_pairs
from dit_accel.models.selection import TokenSelection
from dit_accel.models.tokens import read_once


class QwenImage(PackedTransformer):
    """Qwen-Image, Edit and Layered: blocks with two streams; the text is padded at its end."""

    name = "Qwen-Image"
    stock_processors = ("QwenDoubleStreamAttnProcessor2_0",)
    residuals = ("controlnet_block_samples",)

    def self_attention(self, transformer: Any) -> dict[str, AttentionLayer]:
        return {
            f"transformer_blocks.{i}.attn": AttentionLayer(
                block.attn, block.attn.heads, block.attention_head_dim
            )
            for i, block in enumerate(transformer.transformer_blocks)
        }

    def processor(self, stock: Any) -> Any:
        return QwenImageSparseAttnProcessor(stock)

    def call(self, transformer: Any, arguments: dict[str, Any]) -> Call:
        grid = _image_grid(arguments["img_shapes"], transformer.config.use_layer3d_rope)
        mask = arguments.get("encoder_hidden_states_mask")
        padded = mask is not None and read_once(mask, _is_padded)
        call = self.packed_call(transformer, arguments, grid, mask)
        if call.references and padded:
            raise ValueError(
                f"encoder_hidden_states_mask: hides text tokens, and there are {call.references} tokens of reference images; "
                "accepted are prompts of equal length (run prompts one by one)"
            )
        return call

    def select_inputs(self, selection: TokenSelection, arguments: dict[str, Any]) -> dict[str, Any]:
        arguments = super().select_inputs(selection, arguments)
        if arguments.get("encoder_hidden_states_mask") is None:
            return arguments
        # The model would compare the mask with the text of one process. `_tables` gives it to the processors instead.
        return {**arguments, "encoder_hidden_states_mask": None}

    def hooks(self, transformer: Any, selection: TokenSelection) -> list[Hook]:
        blocks = transformer.transformer_blocks
        hooks = self.packed_hooks(transformer, selection, transformer.img_in, transformer.txt_in)
        hooks += [
            before(transformer.pos_embed, _whole_text, selection),
            after(transformer.pos_embed, _tables, selection, [x.attn for x in blocks]),
        ]
        if transformer.config.zero_cond_t:
            hooks += [before(block, _modulate_references, block.attn) for block in blocks]
        return hooks


def _image_grid(img_shapes: list[Any], layered: bool) -> tuple[int, int, int]:
    """Return the number of image tokens along (t, h, w).

    Args:
        img_shapes: argument of the transformer: for each row, the shape of the image, then shapes of references.
        layered: True if the image has a shape for each layer, and the last shape is the only reference.

    Raises:
        ValueError: layers have different sizes.
    """
    first = img_shapes[0]
    shapes = [tuple(x) for x in (first if isinstance(first, list) else [first])]
    if not layered:
        return shapes[0]
    layers = shapes[:-1]
    if len(set(layers)) != 1:
        raise ValueError(f"img_shapes={shapes}: accepted are layers of one size, and a reference")
    t, h, w = layers[0]
    return t * len(layers), h, w


def _is_padded(mask: Tensor) -> bool:
    """Return whether the mask hides text tokens.

    Raises:
        ValueError: the mask hides tokens before visible ones.
    """
    mask = mask.bool()
    every, at_end = torch.stack([mask.all(), (mask[:, 1:] <= mask[:, :-1]).all()]).tolist()
    if not at_end:
        raise ValueError(
            "encoder_hidden_states_mask: hides text tokens before visible ones; accepted is padding at the end"
        )
    return not every


def _whole_text(selection: TokenSelection, args: tuple, kwargs: dict) -> Any:
    """Let the module make the table of the whole text, although the model has the text of one process."""
    return args, {
        **kwargs,
        "max_txt_seq_len": selection.call.text_length - selection.call.references,
    }


def _tables(
    selection: TokenSelection, layers: list[Any], output: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Return the rotary tables `[R or 1, L, D / 2]` of the image and text tokens that run."""
    image, text = (x[None] for x in output)
    set_text_tokens(selection, layers, text)
    mask = selection.call.mask
    shown = mask.bool() if mask is not None and read_once(mask, _is_padded) else None
    for layer in layers:
        layer.processor.mask = shown
    return image_part(selection, image), text_part(selection, text)


def _modulate_references(attn: Any, args: tuple, kwargs: dict) -> Any:
    """Set the modulation index: 1 for reference tokens, which are clean images, and 0 for image tokens."""
    arguments = {"hidden_states": args[:1], "encoder_hidden_states": args[1:2]}
    image, text = (kwargs[name] if name in kwargs else x[0] for name, x in arguments.items())
    references = attn.processor.num_text_tokens - text.shape[1]
    places = torch.arange(image.shape[1], device=image.device)
    index = (places < references).int()[None]
    if "modulate_index" in kwargs:
        return args, {**kwargs, "modulate_index": index}
    return (*args[:-1], index), kwargs


class QwenImageSparseAttnProcessor(PackedProcessor):
    """Processor of attention over [text, image]."""

    mask: Tensor | None = None
    """Mask `[B, T]`, true for text tokens that are not padding; None: no padding, or the mask is an argument."""

    def release(self) -> Any:
        self.mask = None
        return super().release()

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b l c"],
        encoder_hidden_states: Float[Tensor, "b t c"],
        encoder_hidden_states_mask: Bool[Tensor, "b m"] | None = None,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Float[Tensor, "b l c"], Float[Tensor, "b t c"]]:
        image = head_projections(attn, hidden_states)
        text = text_projections(attn, encoder_hidden_states)
        if image_rotary_emb is not None:
            image, text = (
                _rotated(x, table) for x, table in zip((image, text), image_rotary_emb, strict=True)
            )
        query, key, value = (torch.cat([t, x], dim=1) for x, t in zip(image, text, strict=True))
        mask = encoder_hidden_states_mask if self.mask is None else self.mask

        def dense(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
            return self.dense(q, k, v, _joint_mask(mask, k.shape[1]), scale)

        out = self.run(
            query,
            key,
            value,
            dense,
            text="first",
            text_tokens=self.num_text_tokens,
            text_lengths=None if mask is None else mask.sum(1),
        )
        out = out.flatten(2).to(query.dtype)
        length = encoder_hidden_states.shape[1]
        written = attn.to_out[1](attn.to_out[0](out[:, length:]))
        return written, attn.to_add_out(out[:, :length])


def _rotated(stream: list[Tensor], table: Tensor) -> list[Tensor]:
    """Return query, key and value with the first two rotated by a table of complex numbers."""
    query, key, value = stream
    table = for_heads(table)
    cos, sin = table.real, table.imag
    return [rotate_pairs(query, cos, sin), rotate_pairs(key, cos, sin), value]


def _joint_mask(mask: Tensor | None, length: int) -> Tensor | None:
    """Return the mask of all keys `[B, 1, 1, L]`, given the mask of the text, which precedes the image."""
    if mask is None:
        return None
    image = mask.new_ones(mask.shape[0], length - mask.shape[1])
    return torch.cat([mask, image], dim=1)[:, None, None]
