"""Wan2.1 and Wan2.2 (`WanTransformer3DModel`): facts, and their attention processors."""

import math
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dit_accel.models.attention import projections
from dit_accel.models.call import Call
from dit_accel.models.dispatch import DispatchProcessor
from dit_accel.models.family import AttentionLayer, Family
from dit_accel.models.hooks import Hook, after, before, run_tables, set_text_keys, shrink_tables
from dit_accel.models.rotary import rotate
from dit_accel.models.selection import TokenSelection

TEXT_TOKENS = 512
"""Number of text tokens in models that also read image embeddings; hard-coded in diffusers."""


class Wan(Family):
    """Wan2.1 and Wan2.2 text- and image-to-video; the guidance halves are separate calls."""

    name = "Wan"
    separate_guidance = True
    stock_processors = ("WanAttnProcessor",)

    def self_attention(self, transformer: Any) -> dict[str, AttentionLayer]:
        return {
            f"{name}.attn1": AttentionLayer(
                block.attn1, block.attn1.heads, block.attn1.inner_dim // block.attn1.heads
            )
            for name, block in self.named_blocks(transformer).items()
        }

    def cross_attention(self, transformer: Any) -> dict[str, Any]:
        return {
            f"{name}.attn2": block.attn2 for name, block in self.named_blocks(transformer).items()
        }

    def named_blocks(self, transformer: Any) -> dict[str, Any]:
        """Return the blocks of the transformer by name, in the order in which they run."""
        return {f"blocks.{i}": block for i, block in enumerate(transformer.blocks)}

    def processor(self, stock: Any) -> Any:
        return WanSparseAttnProcessor(stock)

    def cross_processor(self, stock: Any) -> Any:
        return WanTextAttnProcessor(stock)

    def call(self, transformer: Any, arguments: dict[str, Any]) -> Call:
        hidden_states, timestep = arguments["hidden_states"], arguments["timestep"]
        images = arguments.get("encoder_hidden_states_image")
        grid = self.token_grid(transformer, hidden_states)
        if timestep.ndim > 1 and timestep.shape[1:] != (math.prod(grid),):
            raise ValueError(
                f"timestep: shape {tuple(timestep.shape)} for {math.prod(grid)} tokens; accepted are one timestep for each "
                "sample, or one for each token (Wan2.2 TI2V)"
            )
        return Call(
            hidden_states,
            arguments["encoder_hidden_states"],
            transformer.config.out_channels,
            grid,
            timestep,
            images=images,
            # The first and the last frame of a sample may be two rows of `images`.
            image_tokens=0 if images is None else images[..., 0].numel() // len(hidden_states),
            token_flops=self._modulation(transformer) if timestep.ndim > 1 else 0.0,
        )

    def select_inputs(self, selection: TokenSelection, arguments: dict[str, Any]) -> dict[str, Any]:
        if arguments["timestep"].ndim == 1 or selection.passes:
            return arguments
        return {**arguments, "timestep": selection.take(arguments["timestep"])}

    def token_grid(self, transformer: Any, hidden_states: Tensor) -> tuple[int, int, int]:
        t, h, w = (
            n // p
            for n, p in zip(hidden_states.shape[2:], transformer.config.patch_size, strict=True)
        )
        return t, h, w

    def latent_shape(self, pipe: Any, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        frames = (num_frames - 1) // pipe.vae_scale_factor_temporal + 1
        scale = pipe.vae_scale_factor_spatial
        transformer = pipe.transformer if pipe.transformer is not None else pipe.transformer_2
        return 1, transformer.config.in_channels, frames, height // scale, width // scale

    def output_channels(self, transformer: Any) -> int:
        return transformer.config.out_channels

    def hooks(self, transformer: Any, selection: TokenSelection) -> list[Hook]:
        hooks = [
            before(
                transformer.rope, shrink_tables, selection, tuple(transformer.config.patch_size)
            ),
            after(transformer.rope, _rope, selection),
            after(transformer.patch_embedding, _embedded, selection),
            after(transformer.proj_out, selection.complete),
        ]
        if selection.keeps:
            modules = list(self.cross_attention(transformer).values())
            hooks.append(after(transformer.condition_embedder, _text_keys, selection, modules))
        return hooks

    def flops(self, transformer: Any, active: int, tokens: int, text: int) -> float:
        config, dim = transformer.config, dim_of(transformer)
        # Self-attention, query and output of cross-attention, feed-forward.
        linear = 6 * dim * dim + 2 * dim * config.ffn_dim
        attention = 2 * (tokens + text) * dim
        patch = math.prod(config.patch_size)
        ends = dim * patch * (tokens * config.in_channels + active * config.out_channels)
        images = max(0, text - TEXT_TOKENS) if config.image_dim is not None else 0
        ends += (text - images) * dim * (config.text_dim + dim)
        ends += images * (config.image_dim or 0) * ((config.image_dim or 0) + dim)
        blocks = len(self.named_blocks(transformer))
        return 2.0 * (blocks * active * (linear + attention) + ends)

    def text_flops(self, transformer: Any, text: int) -> float:
        return 2.0 * len(self.named_blocks(transformer)) * 2 * text * dim_of(transformer) ** 2

    def _modulation(self, transformer: Any) -> float:
        """Return the FLOPs of one timestep: its embedding and the modulation of all blocks."""
        dim = dim_of(transformer)
        return 2.0 * dim * (transformer.config.freq_dim + 7 * dim)


def dim_of(transformer: Any) -> int:
    """Return the number of channels of a token."""
    config = transformer.config
    return config.num_attention_heads * config.attention_head_dim


def _rope(selection: TokenSelection, output: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return tuple(selection.take(x) for x in run_tables(selection, output))


def _embedded(selection: TokenSelection, output: Float[Tensor, "r c t h w"]) -> Tensor:
    """Return the tokens that run as a video of 1 x 1 frames, which the model flattens to a sequence."""
    if selection.passes:
        return output
    return gathered(selection, output.flatten(2))


def gathered(
    selection: TokenSelection, tokens: Float[Tensor, "r c n"]
) -> Float[Tensor, "r c m 1 1"]:
    """Return the tokens that run as a video of 1 x 1 frames."""
    tokens = selection.take(tokens.transpose(1, 2))
    # Contiguous, so that the sequence has the strides for which blocks were compiled.
    return tokens.transpose(1, 2).contiguous()[..., None, None]


def _text_keys(selection: TokenSelection, modules: list[Any], output: tuple[Any, ...]) -> None:
    text, image = output[2], output[3]

    def contexts() -> list[Tensor]:
        context = text if image is None else torch.cat([image, text], dim=1)
        return [context] * len(modules)

    set_text_keys(selection, modules, _text_key_value, contexts)


def _text_key_value(attn: Any, context: Tensor) -> tuple[Tensor, ...]:
    """Return (key, value) or (key, value, image key, image value), `[R, L, H, D]` each."""
    text = context
    image: tuple[Tensor, ...] = ()
    if attn.add_k_proj is not None:
        length = context.shape[1] - TEXT_TOKENS
        clip, text = context[:, :length], context[:, length:]
        if attn.fused_projections:
            k, v = attn.to_added_kv(clip).chunk(2, dim=-1)
        else:
            k, v = attn.add_k_proj(clip), attn.add_v_proj(clip)
        image = (attn.norm_added_k(k), v)
    if attn.fused_projections:
        k, v = attn.to_kv(text).chunk(2, dim=-1)
    else:
        k, v = attn.to_k(text), attn.to_v(text)
    return tuple(x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_k(k), v, *image))


class WanSparseAttnProcessor(DispatchProcessor):
    """Processor of self-attention."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b l c"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "b l c"]:
        query, key, value = projections(attn, hidden_states)
        query, key = (
            attn.norm_q(query),
            attn.norm_k(key),
        )  # norms over all heads, before heads are split
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        if rotary_emb is not None:
            query, key = rotate(query, *rotary_emb), rotate(key, *rotary_emb)
        out = self.run(
            query,
            key,
            value,
            partial(self.dense, mask=attention_mask),
            masked=attention_mask is not None,
        )
        out = out.flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](out))


class WanTextAttnProcessor(DispatchProcessor):
    """Processor of cross-attention to text (and image), whose keys and values are computed once per context."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b l c"],
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Float[Tensor, "b l c"]:
        text = self.text or _text_key_value(attn, encoder_hidden_states)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        out = self.dense(query, text[0], text[1], attention_mask).flatten(2, 3).type_as(query)
        if len(text) == 4:
            out = out + self.dense(query, text[2], text[3]).flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](out))
