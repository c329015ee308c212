"""Lumina-Next (`LuminaNextDiT2DModel`): facts, and its attention processors."""

from typing import Any

from diffusers.models.embeddings import apply_rotary_emb
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dit_accel.models.attention import SparseProcessor, grouped_attention
from dit_accel.models.call import Call
from dit_accel.models.family import AttentionLayer, Family
from dit_accel.models.hooks import Hook, after, set_text_keys
from dit_accel.models.selection import TokenSelection


class LuminaNext(Family):
    """Self- and cross-attention side by side; guidance halves [cond, uncond] in one batch."""

    name = "Lumina-Next"
    separate_guidance = False
    repeated_blocks = ("LuminaNextDiTBlock",)
    stock_processors = ("LuminaAttnProcessor2_0",)

    def self_attention(self, transformer: Any) -> dict[str, AttentionLayer]:
        return {
            f"layers.{i}.attn1": AttentionLayer(
                layer.attn1, layer.attn1.inner_kv_dim // layer.head_dim, layer.head_dim
            )
            for i, layer in enumerate(transformer.layers)
        }

    def cross_attention(self, transformer: Any) -> dict[str, Any]:
        return {f"layers.{i}.attn2": layer.attn2 for i, layer in enumerate(transformer.layers)}

    def processor(self, stock: Any) -> Any:
        return LuminaSparseAttnProcessor(stock)

    def cross_processor(self, stock: Any) -> Any:
        return LuminaTextAttnProcessor(stock)

    def call(self, transformer: Any, arguments: dict[str, Any]) -> Call:
        table = arguments["image_rotary_emb"]
        hidden_states = arguments["hidden_states"]
        return Call(
            hidden_states,
            arguments["encoder_hidden_states"],
            transformer.config.in_channels,
            self.token_grid(transformer, hidden_states),
            arguments.get("timestep"),
            mask=arguments.get("encoder_mask"),
            # Cached keys are rotated, and the pipeline changes its rotary table at `scaling_watershed`.
            # The table is on the CPU, so reading it does not wait for a device.
            epoch=tuple(table[1, 1].tolist()) if table.device.type == "cpu" else None,
        )

    def hooks(self, transformer: Any, selection: TokenSelection) -> list[Hook]:
        return [
            after(transformer.patch_embedder, _embedded, selection, transformer.layers),
            after(transformer.norm_out, selection.complete),
        ]

    def flops(self, transformer: Any, active: int, tokens: int, text: int) -> float:
        config = transformer.config
        dim, layer = config.hidden_size, transformer.layers[0]
        ffn = layer.feed_forward.linear_1.out_features
        # Queries of self- and cross-attention, keys, values, output, gated feed-forward.
        linear = 3 * dim * dim + 2 * dim * layer.attn1.inner_kv_dim + 3 * dim * ffn
        attention = 2 * (tokens + text) * dim
        patch = config.patch_size**2
        ends = dim * patch * (tokens * config.in_channels + active * transformer.out_channels)
        return 2.0 * (config.num_layers * active * (linear + attention) + ends)

    def text_flops(self, transformer: Any, text: int) -> float:
        attn = transformer.layers[0].attn2
        width = transformer.config.cross_attention_dim
        return 2.0 * transformer.config.num_layers * 2 * text * width * attn.inner_kv_dim


def _embedded(selection: TokenSelection, layers: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
    tokens, mask, size, rotary = output
    if selection.keeps:
        modules = [x.attn2 for x in layers]
        text = selection.call.context
        set_text_keys(
            selection, modules, _key_value, lambda: [x.norm1_context(text) for x in layers]
        )
    return selection.take(tokens), selection.take(mask), size, selection.take(rotary)


def _key_value(attn: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys (normalised, not rotated) and values, `[R, L, H_kv, D]`."""
    key, value = attn.to_k(hidden_states), attn.to_v(hidden_states)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    head_dim = attn.inner_dim // attn.heads
    return key.unflatten(2, (-1, head_dim)), value.unflatten(2, (-1, head_dim))


class _Processor(SparseProcessor):
    def query(
        self, attn: Any, hidden_states: Tensor, rotary: Tensor | None
    ) -> Float[Tensor, "b l h d"]:
        query = attn.to_q(hidden_states)
        dtype = query.dtype
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        query = query.unflatten(2, (attn.heads, -1))
        if rotary is not None:
            query = apply_rotary_emb(query, rotary, use_real=False)
        return query.to(dtype)


class LuminaSparseAttnProcessor(_Processor):
    """Processor of self-attention. It returns separate heads, because the block multiplies each by a gate."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b l c"],
        encoder_hidden_states: Tensor,
        attention_mask: Int[Tensor, "b m"] | Bool[Tensor, "b m"] | None = None,
        query_rotary_emb: Tensor | None = None,
        key_rotary_emb: Tensor | None = None,
        base_sequence_length: int | None = None,
    ) -> Float[Tensor, "b l h d"]:
        query = self.query(attn, hidden_states, query_rotary_emb)
        key, value = _key_value(attn, encoder_hidden_states)
        if key_rotary_emb is not None:
            key = apply_rotary_emb(key, key_rotary_emb, use_real=False)  # type: ignore[assignment]
        key = key.to(query.dtype)

        def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            whole = attention_mask is not None and attention_mask.shape[1] == k.shape[1]
            return grouped_attention(q, k, v, attention_mask if whole else None, scale)

        # The mask covers image tokens and hides none of them.
        return self.run(
            query, key, value, dense, scale=attn.scale, base_length=base_sequence_length
        )


class LuminaTextAttnProcessor(_Processor):
    """Processor of cross-attention to the text, whose keys and values are computed once per context."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b l c"],
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        query_rotary_emb: Tensor | None = None,
        key_rotary_emb: Tensor | None = None,
        base_sequence_length: int | None = None,
    ) -> Float[Tensor, "b l h d"]:
        query = self.query(attn, hidden_states, query_rotary_emb)
        key, value = self.text or _key_value(attn, encoder_hidden_states)
        return grouped_attention(query, key.to(query.dtype), value, attention_mask, None)
