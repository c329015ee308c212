"""CogVideoX (`CogVideoXTransformer3DModel`): facts, and the joint attention processor."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dit_accel.models.attention import SparseProcessor, grouped_attention, head_projections
from dit_accel.models.call import Call
from dit_accel.models.family import AttentionLayer, Family
from dit_accel.models.hooks import Hook, after, before
from dit_accel.models.rotary import for_heads, rotate
from dit_accel.models.selection import TokenSelection


class CogVideoX(Family):
    """Joint attention over [text, video]; guidance halves [uncond, cond] in one batch.

    Latents have frames before channels, in input and output. Image-to-video has conditions in additional channels.
    """

    name = "CogVideoX"
    separate_guidance = False
    channel_axis = 2
    repeated_blocks = ("CogVideoXBlock",)
    stock_processors = ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0")

    def self_attention(self, transformer: Any) -> dict[str, AttentionLayer]:
        config = transformer.config
        return {
            f"transformer_blocks.{i}.attn1": AttentionLayer(
                block.attn1, config.num_attention_heads, config.attention_head_dim
            )
            for i, block in enumerate(transformer.transformer_blocks)
        }

    def processor(self, stock: Any) -> Any:
        return CogVideoXSparseAttnProcessor(stock)

    def call(self, transformer: Any, arguments: dict[str, Any]) -> Call:
        if (arguments.get("attention_kwargs") or {}).get("attention_mask") is not None:
            raise ValueError(
                "attention_kwargs['attention_mask']: masks of joint attention do not work with acceleration; "
                "disable() first"
            )
        hidden_states = arguments["hidden_states"].transpose(1, 2)
        return Call(
            hidden_states,
            arguments["encoder_hidden_states"],
            self.output_channels(transformer),
            self.token_grid(transformer, hidden_states),
            arguments["timestep"],
        )

    def token_grid(self, transformer: Any, hidden_states: Tensor) -> tuple[int, int, int]:
        p = transformer.config.patch_size
        t, h, w = hidden_states.shape[2:]
        return t // (transformer.config.patch_size_t or 1), h // p, w // p

    def latent_shape(self, pipe: Any, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        config, scale = pipe.transformer.config, pipe.vae_scale_factor_spatial
        frames = (num_frames - 1) // pipe.vae_scale_factor_temporal + 1
        frames += -frames % (config.patch_size_t or 1)  # the pipeline pads to whole patches
        return 1, config.in_channels, frames, height // scale, width // scale

    def output_channels(self, transformer: Any) -> int:
        return transformer.config.out_channels

    def select_inputs(self, selection: TokenSelection, arguments: dict[str, Any]) -> dict[str, Any]:
        if selection.passes:
            return arguments
        # The transformer splits text from video by the length of this argument.
        text = selection.part(arguments["encoder_hidden_states"])
        changed: dict[str, Any] = {"encoder_hidden_states": text}
        if (tables := arguments.get("image_rotary_emb")) is not None:
            changed["image_rotary_emb"] = tuple(selection.take(x[None]) for x in tables)
        return {**arguments, **changed}

    def hooks(self, transformer: Any, selection: TokenSelection) -> list[Hook]:
        return [
            before(transformer.patch_embed, _whole_text, selection),
            after(transformer.patch_embed, _tokens, selection),
            after(transformer.proj_out, selection.complete),
        ]

    def flops(self, transformer: Any, active: int, tokens: int, text: int) -> float:
        config = transformer.config
        dim = config.num_attention_heads * config.attention_head_dim
        # Projections of attention and feed-forward; attention reads all tokens. Then the modulation of two norms.
        row = 12 * dim * dim + 2 * (tokens + text) * dim
        blocks = config.num_layers * ((active + text) * row + 12 * config.time_embed_dim * dim)
        conditions = config.time_embed_dim * (dim + config.time_embed_dim + 2 * dim)
        conditions += 2 * (config.ofs_embed_dim or 0) ** 2
        patch = config.patch_size**2 * (config.patch_size_t or 1)
        ends = patch * (tokens * config.in_channels + active * config.out_channels)
        return 2.0 * (blocks + conditions + dim * (ends + text * config.text_embed_dim))


def _whole_text(selection: TokenSelection, args: tuple, kwargs: dict) -> Any:
    """Replace the text of this process by the whole text, because positional embeddings cover the whole text."""
    text = selection.call.context
    if text is None or text.shape[1] == args[0].shape[1]:
        return args, kwargs
    return (text.to(args[0]), *args[1:]), kwargs


def _tokens(selection: TokenSelection, output: Tensor) -> Tensor:
    """Return [text, video] with the text of this process and the video tokens that run."""
    if selection.passes:
        return output
    text_tokens = selection.call.text_length
    return torch.cat(
        [selection.part(output[:, :text_tokens]), selection.take(output[:, text_tokens:])], dim=1
    )


class CogVideoXSparseAttnProcessor(SparseProcessor):
    """Processor of attention over [text, video]. Only video tokens pass the seam `kv_store`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b l c"],
        encoder_hidden_states: Float[Tensor, "b t c"],
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Float[Tensor, "b l c"], Float[Tensor, "b t c"]]:
        text_tokens = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = head_projections(attn, joint)
        if image_rotary_emb is not None:
            cos, sin = (for_heads(x) for x in image_rotary_emb)
            query, key = (
                torch.cat([x[:, :text_tokens], rotate(x[:, text_tokens:], cos, sin)], dim=1)
                for x in (query, key)
            )
        out = self.run(query, key, value, grouped_attention, text="first", text_tokens=text_tokens)
        out = attn.to_out[1](attn.to_out[0](out.flatten(2).to(query.dtype)))
        return out[:, text_tokens:], out[:, :text_tokens]
