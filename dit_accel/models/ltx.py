"""LTX-Video (`LTXVideoTransformer3DModel`): facts, and its attention processors."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dit_accel.models.call import Call
from dit_accel.models.dispatch import DispatchProcessor
from dit_accel.models.family import AttentionLayer, Family
from dit_accel.models.hooks import Hook, after, before, run_tables, set_text_keys
from dit_accel.models.rotary import rotate
from dit_accel.models.selection import TokenSelection
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
    """Text-, image- and video-to-video with one token for each latent position.

    Guidance halves [uncond, cond] are one batch. Conditions are tokens of the video with their own timestep, or frames
    before the video.
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
                f"hidden_states: {hidden_states.shape[1]} tokens, but {t} frames of {h} x {w} tokens; accepted are whole frames"
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
        # Self-attention, query and output of cross-attention, feed-forward; attention reads all tokens.
        row = 14 * dim * dim + 2 * (tokens + text) * dim
        ends = tokens * config.in_channels + active * config.out_channels
        ends += (
            text * (config.caption_channels + dim) + 256 + 7 * dim
        )  # embeddings of text and timestep
        return 2.0 * (config.num_layers * active * row + dim * ends)

    def text_flops(self, transformer: Any, text: int) -> float:
        config = transformer.config
        dim = config.num_attention_heads * config.attention_head_dim
        return 2.0 * config.num_layers * 2 * text * config.cross_attention_dim * dim


def _grid_of(places: Float[Tensor, "r 3 n"]) -> tuple[int, int, int]:
    """Return the number of tokens along (t, h, w), from the positions (time, height, width) of the tokens."""
    _, row, column = places[0]
    # Numbers of tokens in the first row and in the first column of all frames together.
    in_row, in_column = torch.stack([(x == x[0]).sum() for x in (row, column)]).tolist()
    h, w = len(row) // in_row, len(row) // in_column
    return len(row) // (h * w), h, w


def _shrink_rope(selection: TokenSelection, args: tuple, kwargs: dict) -> Any:
    """Let the module make rotary tables of one row, or of a single token if the tables are stored."""
    arguments = {**dict(zip(ROPE_ARGUMENTS, args, strict=False)), **kwargs}
    if arguments.get("video_coords") is not None:
        selection.per_run.pop("rope", None)  # positions may differ between rows and calls
        return (), arguments
    arguments["hidden_states"] = arguments["hidden_states"][:1]
    if "rope" in selection.per_run:
        arguments |= {"num_frames": 1, "height": 1, "width": 1}
    return (), arguments


def _rope(selection: TokenSelection, output: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return tuple(selection.take(x) for x in run_tables(selection, output))


def _text_keys(selection: TokenSelection, modules: list[Any], output: Tensor) -> None:
    set_text_keys(selection, modules, _key_value, lambda: [output] * len(modules))


def _key_value(attn: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys (normalised, not rotated) `[B, L, H * D]` and values `[B, L, H, D]`."""
    key, value = attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
    return key, value.unflatten(2, (attn.heads, -1))


class LTXSparseAttnProcessor(DispatchProcessor):
    """Processor of self-attention over the video."""

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
            # Before heads are split: each pair of channels of each head has its own angle.
            cos, sin = (x.unsqueeze(2) for x in image_rotary_emb)
            query, key = (rotate(x.unsqueeze(2), cos, sin).squeeze(2) for x in (query, key))
        query, key = (x.unflatten(2, (attn.heads, -1)) for x in (query, key))
        out = self.run(query, key, value, self.dense)
        return attn.to_out[1](attn.to_out[0](out.flatten(2).to(query.dtype)))


class LTXTextAttnProcessor(DispatchProcessor):
    """Processor of cross-attention to the text, whose keys and values are computed once per context."""

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
