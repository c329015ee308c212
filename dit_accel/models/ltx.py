"""LTX-Video (`LTXVideoTransformer3DModel`): facts, and its attention processors."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dit_accel.models.attention import computed_once
from dit_accel.models.dispatch import DispatchProcessor
from dit_accel.models.family import (
    AttentionLayer,
    Call,
    Family,
    Hook,
    TokenSelection,
    after,
    before,
)
from dit_accel.models.rotary import rotate
from dit_accel.models.tokens import read_once

ROPE_ARGUMENTS = (
    "hidden_states",
    "num_frames",
    "height",
    "width",
    "rope_interpolation_scale",
    "video_coords",
)


class LTXVideo(Family):
    """Text-, image- and video-to-video over one token for each latent position; guidance halves [uncond, cond] in one
    batch. Conditions are tokens of the video with a timestep of their own, or frames before it.
    """

    name = "LTX-Video"
    separate_guidance = False
    exchanging_cross_attention = True
    stock_processors = ("LTXVideoAttnProcessor",)

    def self_attention(self, transformer: Any) -> dict[str, AttentionLayer]:
        return {
            f"transformer_blocks.{i}.attn1": AttentionLayer(
                block.attn1, block.attn1.heads, block.attn1.head_dim
            )
            for i, block in enumerate(transformer.transformer_blocks)
        }

    def cross_attention(self, transformer: Any) -> dict[str, Any]:
        blocks = transformer.transformer_blocks
        return {f"transformer_blocks.{i}.attn2": block.attn2 for i, block in enumerate(blocks)}

    def processor(self, stock: Any) -> Any:
        return LTXSparseAttnProcessor(stock)

    def cross_processor(self, stock: Any) -> Any:
        return LTXTextAttnProcessor(stock)

    def call(self, transformer: Any, arguments: dict[str, Any]) -> Call:
        hidden_states, places = arguments["hidden_states"], arguments.get("video_coords")
        if places is None:
            t, h, w = (arguments[name] for name in ("num_frames", "height", "width"))
        else:
            t, h, w = read_once(places, _grid_of)
        if t * h * w != hidden_states.shape[1]:
            raise ValueError(
                f"hidden_states: {hidden_states.shape[1]} tokens, but {t} frames of {h} x {w}; acceleration accepts "
                "whole frames"
            )
        return Call(
            hidden_states.transpose(1, 2).unflatten(2, (t, h, w)),
            arguments["encoder_hidden_states"],
            transformer.config.in_channels,
            (t, h, w),
            arguments["timestep"],
            mask=arguments.get("encoder_attention_mask"),
        )

    def token_grid(self, transformer: Any, hidden_states: Tensor) -> tuple[int, int, int]:
        t, h, w = hidden_states.shape[2:]
        return t, h, w

    def latent_shape(self, pipe: Any, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        frames = (num_frames - 1) // pipe.vae_temporal_compression_ratio + 1
        scale = pipe.vae_spatial_compression_ratio
        return 1, pipe.transformer.config.in_channels, frames, height // scale, width // scale

    def output_channels(self, transformer: Any) -> int:
        return transformer.config.out_channels

    def select_inputs(self, selection: TokenSelection, arguments: dict[str, Any]) -> dict[str, Any]:
        timestep = arguments["timestep"]
        one_for_each = timestep.ndim > 1 and timestep.shape[1] > 1
        if selection.passes or not one_for_each:
            return arguments
        return {**arguments, "timestep": selection.take(timestep)}

    def hooks(self, transformer: Any, selection: TokenSelection) -> list[Hook]:
        hooks = [
            before(transformer.rope, _shrink_rope, selection),
            after(transformer.rope, _rope, selection),
            after(transformer.proj_in, selection.take),
            after(transformer.proj_out, selection.complete),
        ]
        if selection.keeps:
            modules = list(self.cross_attention(transformer).values())
            hooks.append(after(transformer.caption_projection, _text_keys, selection, modules))
        return hooks

    def flops(self, transformer: Any, active: int, tokens: int, text: int) -> float:
        config = transformer.config
        dim = config.num_attention_heads * config.attention_head_dim
        # Self-attention, query and out of cross-attention, feed-forward; attention reads all tokens.
        row = 14 * dim * dim + 2 * (tokens + text) * dim
        ends = tokens * config.in_channels + active * config.out_channels
        ends += text * (config.caption_channels + dim) + 256 + 7 * dim  # text, and one timestep
        return 2.0 * (config.num_layers * active * row + dim * ends)

    def text_flops(self, transformer: Any, text: int) -> float:
        config = transformer.config
        dim = config.num_attention_heads * config.attention_head_dim
        return 2.0 * config.num_layers * 2 * text * config.cross_attention_dim * dim


def _grid_of(places: Float[Tensor, "r 3 n"]) -> tuple[int, int, int]:
    """Return frames, rows and columns of the tokens that stand at these places (time, height, width)."""
    _, row, column = places[0]
    # The first row of all frames, and the first column of all frames.
    in_row, in_column = torch.stack([(x == x[0]).sum() for x in (row, column)]).tolist()
    h, w = len(row) // in_row, len(row) // in_column
    return len(row) // (h * w), h, w


def _shrink_rope(selection: TokenSelection, args: tuple, kwargs: dict) -> Any:
    """Let the module make the tables of one row; of a single token, if they are known."""
    arguments = {**dict(zip(ROPE_ARGUMENTS, args, strict=False)), **kwargs}
    if arguments.get("video_coords") is not None:
        selection.per_run.pop("rope", None)  # places may differ between rows, and from call to call
        return (), arguments
    arguments["hidden_states"] = arguments["hidden_states"][:1]
    if "rope" in selection.per_run:
        arguments |= {"num_frames": 1, "height": 1, "width": 1}
    return (), arguments


def _rope(selection: TokenSelection, output: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    tables = selection.per_run.setdefault("rope", output)
    return tuple(selection.take(x) for x in tables)


def _text_keys(selection: TokenSelection, modules: list[Any], output: Tensor) -> None:
    """Compute keys and values of the text for every cross-attention layer, once per context."""
    if "text" not in selection.per_context:
        selection.per_context["text"] = [
            computed_once(attn, _key_value, output) for attn in modules
        ]
    for attn, known in zip(modules, selection.per_context["text"], strict=True):
        attn.processor.text = known


def _key_value(attn: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys (normalised, not rotated) `[B, L, H * D]` and values `[B, L, H, D]`."""
    key, value = attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
    return key, value.unflatten(2, (attn.heads, -1))


class LTXSparseAttnProcessor(DispatchProcessor):
    """Self-attention over the video; see `Family.processor`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b l c"],
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "b l c"]:
        query = attn.norm_q(attn.to_q(hidden_states))
        key, value = _key_value(attn, hidden_states)
        if image_rotary_emb is not None:
            # Across heads: pairs of channels of all heads have angles of their own.
            cos, sin = (x.unsqueeze(2) for x in image_rotary_emb)
            query, key = (rotate(x.unsqueeze(2), cos, sin).squeeze(2) for x in (query, key))
        query, key = (x.unflatten(2, (attn.heads, -1)) for x in (query, key))
        out = self.run(query, key, value, self.dense)
        return attn.to_out[1](attn.to_out[0](out.flatten(2).to(query.dtype)))


class LTXTextAttnProcessor(DispatchProcessor):
    """Cross-attention to the text, whose keys and values are computed once per context."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b l c"],
        encoder_hidden_states: Tensor,
        attention_mask: Float[Tensor, "b 1 m"] | None = None,
        image_rotary_emb: None = None,
    ) -> Float[Tensor, "b l c"]:
        key, value = self.text or _key_value(attn, encoder_hidden_states)
        query, key = (
            x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(attn.to_q(hidden_states)), key)
        )
        mask = None if attention_mask is None else attention_mask[:, None]
        out = self.dense(query, key, value, mask).flatten(2).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](out))
