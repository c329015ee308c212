"""HunyuanVideo (`HunyuanVideoTransformer3DModel`): facts, and the attention processor of both kinds of blocks."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dit_accel.models.attention import head_projections, text_projections
from dit_accel.models.call import Call
from dit_accel.models.dispatch import DispatchProcessor
from dit_accel.models.family import AttentionLayer, Family
from dit_accel.models.hooks import Hook, after, before, run_tables, shrink_tables
from dit_accel.models.rotary import rotate
from dit_accel.models.selection import TokenSelection


class HunyuanVideo(Family):
    """HunyuanVideo text-to-video: blocks with two streams, then blocks with one, over [image, text, padding].

    The guidance halves are separate calls.
    """

    name = "HunyuanVideo"
    separate_guidance = True
    stock_processors = ("HunyuanVideoAttnProcessor2_0",)

    def self_attention(self, transformer: Any) -> dict[str, AttentionLayer]:
        config = transformer.config
        if config.image_condition_type == "token_replace":
            raise ValueError(
                "transformer.config.image_condition_type='token_replace': the blocks treat their first tokens as the "
                "first frame, which selecting and reordering tokens breaks; accepted are None and 'latent_concat', or ras "
                "without a ratio"
            )
        return {
            f"{group}.{i}.attn": AttentionLayer(
                block.attn, config.num_attention_heads, config.attention_head_dim
            )
            for group in ("transformer_blocks", "single_transformer_blocks")
            for i, block in enumerate(getattr(transformer, group))
        }

    def processor(self, stock: Any) -> Any:
        return HunyuanVideoSparseAttnProcessor(stock)

    def call(self, transformer: Any, arguments: dict[str, Any]) -> Call:
        hidden_states = arguments["hidden_states"]
        return Call(
            hidden_states,
            arguments["encoder_hidden_states"],
            self.output_channels(transformer),
            self.token_grid(transformer, hidden_states),
            arguments["timestep"],
            mask=arguments["encoder_attention_mask"],
        )

    def token_grid(self, transformer: Any, hidden_states: Tensor) -> tuple[int, int, int]:
        t, h, w = (
            n // p for n, p in zip(hidden_states.shape[2:], _patch(transformer), strict=True)
        )
        return t, h, w

    def latent_shape(self, pipe: Any, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        frames = (num_frames - 1) // pipe.vae_scale_factor_temporal + 1
        scale = pipe.vae_scale_factor_spatial
        return 1, pipe.transformer.config.in_channels, frames, height // scale, width // scale

    def output_channels(self, transformer: Any) -> int:
        return transformer.config.out_channels

    def hooks(self, transformer: Any, selection: TokenSelection) -> list[Hook]:
        layers = [x.module for x in self.self_attention(transformer).values()]
        return [
            before(transformer.rope, shrink_tables, selection, _patch(transformer)),
            after(transformer.rope, _rope, selection, layers),
            after(transformer.x_embedder, selection.take),
            after(transformer.context_embedder, selection.part),
            after(transformer.proj_out, selection.complete),
        ]

    def flops(self, transformer: Any, active: int, tokens: int, text: int) -> float:
        config = transformer.config
        dim = config.num_attention_heads * config.attention_head_dim
        double, single = config.num_layers, config.num_single_layers
        ffn = 2 * config.mlp_ratio * dim * dim
        # Projections of attention, and feed-forward; attention reads all tokens.
        row = 4 * dim * dim + ffn + 2 * (tokens + text) * dim
        blocks = (double + single) * (active + text) * row + (12 * double + 3 * single) * dim * dim
        refiner = config.num_refiner_layers * (
            text * (12 * dim * dim + 2 * text * dim) + 2 * dim * dim
        )
        refiner += text * config.text_embed_dim * dim
        # Embeddings of timestep, guidance and pooled text, for the blocks and for the refiner; the last norm.
        embedders = 2 + config.guidance_embeds
        conditions = (256 + dim) * embedders + config.pooled_projection_dim + dim
        conditions += config.text_embed_dim + dim + 2 * dim
        patch = config.patch_size_t * config.patch_size**2
        ends = patch * (tokens * config.in_channels + active * config.out_channels)
        return 2.0 * (blocks + refiner + dim * (conditions + ends))


def _patch(transformer: Any) -> tuple[int, int, int]:
    config = transformer.config
    return config.patch_size_t, config.patch_size, config.patch_size


def _rope(
    selection: TokenSelection, layers: list[Any], output: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Return the rotary tables `[R or 1, n, D]` of the tokens that run. Set the text lengths in the processors."""
    mask = selection.call.mask
    assert mask is not None
    processes = selection.call.processes
    if processes is not None and mask.shape[1] < processes.size:
        # Blocks with one stream split the text off the end of the sequence, which needs at least one text token.
        raise ValueError(
            f"encoder_hidden_states: {mask.shape[1]} text tokens, and {processes.size} processes; accepted is one or more "
            "for each process"
        )
    lengths = mask.sum(1, dtype=torch.int32)  # the model, too, uses only the lengths
    counts = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
    for layer in layers:
        layer.processor.text_lengths, layer.processor.text_mask = lengths, counts
    return tuple(selection.take(x[None]) for x in run_tables(selection, output))


class HunyuanVideoSparseAttnProcessor(DispatchProcessor):
    """Processor of attention over [image, text]. Only image tokens pass the seam `kv_store`."""

    text_lengths: Int[Tensor, " b"] | None = None
    """Number of text tokens of each row that are not padding, in the current call."""
    text_mask: Bool[Tensor, "b t"] | None = None
    """Mask of the same tokens."""

    def release(self) -> Any:
        self.text_lengths = self.text_mask = None
        return super().release()

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b l c"],
        encoder_hidden_states: Float[Tensor, "b t c"],
        attention_mask: Bool[Tensor, "b 1 1 m"] | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Float[Tensor, "b l c"], Float[Tensor, "b t c"]]:
        active, text_tokens = hidden_states.shape[1], encoder_hidden_states.shape[1]
        two_streams = attn.add_q_proj is not None
        streams = [head_projections(attn, hidden_states)]
        if two_streams:
            streams.append(text_projections(attn, encoder_hidden_states))
        else:
            streams.append(head_projections(attn, encoder_hidden_states))
        if image_rotary_emb is not None:
            cos, sin = (x.unsqueeze(-2) for x in image_rotary_emb)
            streams[0][:2] = [rotate(x, cos, sin) for x in streams[0][:2]]
        query, key, value = (torch.cat(x, dim=1) for x in zip(*streams, strict=True))

        counts = self.text_mask

        def dense(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
            assert counts is not None
            image = counts.new_ones(len(counts), k.shape[1] - counts.shape[1])
            return self.dense(q, k, v, torch.cat([image, counts], dim=1)[:, None, None], scale)

        out = self.run(
            query,
            key,
            value,
            dense,
            text="last",
            text_tokens=text_tokens,
            text_lengths=self.text_lengths,
        )
        out = out.flatten(2).to(query.dtype)
        image, text = out[:, :active], out[:, active:]
        if not two_streams:
            return image, text  # the block has one projection for attention and feed-forward
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)
