"""Lumina-Image 2.0 (`Lumina2Transformer2DModel`): facts, and its attention processor."""

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from jaxtyping import Bool, Float
from torch import Tensor

from dit_accel.models.attention import SparseProcessor, grouped_attention
from dit_accel.models.call import Call
from dit_accel.models.family import AttentionLayer, Family
from dit_accel.models.hooks import Hook, after, before
from dit_accel.models.selection import TokenSelection
from dit_accel.models.tokens import take


class Lumina2(Family):
    """Lumina-Image 2.0: refiners of text and image, then layers over [text, image].

    The guidance halves are separate calls.
    """

    name = "Lumina-Image 2.0"
    separate_guidance = True
    repeated_blocks = ("Lumina2TransformerBlock",)
    stock_processors = ("Lumina2AttnProcessor2_0",)

    def self_attention(self, transformer: Any) -> dict[str, AttentionLayer]:
        groups = {"noise_refiner": "image", "layers": "joint"}
        return {
            f"{group}.{i}.attn": AttentionLayer(
                layer.attn, layer.attn.inner_kv_dim // layer.head_dim, layer.head_dim, layout
            )
            for group, layout in groups.items()
            for i, layer in enumerate(getattr(transformer, group))
        }

    def processor(self, stock: Any) -> Any:
        return Lumina2SparseAttnProcessor(stock)

    def call(self, transformer: Any, arguments: dict[str, Any]) -> Call:
        hidden_states = arguments["hidden_states"]
        return Call(
            hidden_states,
            arguments["encoder_hidden_states"],
            transformer.config.in_channels,
            self.token_grid(transformer, hidden_states),
            arguments.get("timestep"),
            mask=arguments.get("encoder_attention_mask"),
        )

    def hooks(self, transformer: Any, selection: TokenSelection) -> list[Hook]:
        refiners = transformer.context_refiner
        return [
            before(
                transformer.rope_embedder, _shrink_tables, selection, transformer.config.patch_size
            ),
            after(transformer.rope_embedder, _gather, selection, transformer.config.patch_size),
            after([transformer.x_embedder, *transformer.noise_refiner][-1], selection.whole),
            before(transformer.layers[0], _joint_part, selection),
            after(transformer.norm_out, _complete, selection),
            *(before(layer, _shrink_text, selection) for layer in refiners),
            *(after(layer, _refined_text, selection) for layer in refiners[-1:]),
        ]

    def flops(self, transformer: Any, active: int, tokens: int, text: int) -> float:
        config, linear = transformer.config, self._linear(transformer)
        dim, layers = config.hidden_size, transformer.layers
        joint = (active + text) * (linear + 2 * (tokens + text) * dim)
        image = active * (linear + 2 * tokens * dim)
        total = len(layers) * joint + len(transformer.noise_refiner) * image
        ends = active * config.in_channels + (active + text) * transformer.out_channels
        caption = text * config.cap_feat_dim * dim
        return 2.0 * (total + config.patch_size**2 * dim * ends + caption)

    def text_flops(self, transformer: Any, text: int) -> float:
        block = self._linear(transformer) + 2 * text * transformer.config.hidden_size
        return 2.0 * len(transformer.context_refiner) * text * block

    def _linear(self, transformer: Any) -> int:
        """Return the number of weights that are applied to each token in a block."""
        dim, block = transformer.config.hidden_size, transformer.layers[0]
        ffn = block.feed_forward.linear_1.out_features
        return 2 * dim * dim + 2 * dim * block.attn.inner_kv_dim + 3 * dim * ffn


def _shrink_tables(selection: TokenSelection, patch_size: int, args: tuple, kwargs: dict) -> Any:
    """Let the module make tables of two tokens if the tables of this context are stored.

    The inputs are on the CPU, where reading the length of the text does not wait for a device.
    """
    if "tables" in selection.per_context:
        latents = args[0].new_zeros(1, args[0].shape[1], patch_size, patch_size, device="cpu")
        args = (latents, torch.ones(1, 1, dtype=torch.int64))
    return args, kwargs


def _gather(selection: TokenSelection, patch_size: int, output: tuple[Any, ...]) -> tuple[Any, ...]:
    tables = selection.per_context.setdefault("tables", output[1:])
    text_table, image_table, joint_table, text_lengths, lengths = tables
    tokens = _patchify(selection.call.hidden_states, patch_size)
    index = selection.place("joint", max(lengths), text_lengths)
    if index is not None and selection.index is not None:
        left_out = tokens.shape[1] - selection.index.shape[1]
        joint_table = take(joint_table, index)
        lengths = [n - left_out for n in lengths]
    # The model cuts its output with this list object. `_complete` writes the full lengths into it.
    selection.per_context["lengths"] = lengths = list(lengths)
    return (
        selection.take(tokens),
        text_table,
        selection.take(image_table),
        selection.part(joint_table, "joint"),
        text_lengths,
        lengths,
    )


def _patchify(x: Float[Tensor, "b c h w"], p: int) -> Float[Tensor, "b n d"]:
    b, c, h, w = x.shape
    return x.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def _joint_part(selection: TokenSelection, args: tuple, kwargs: dict) -> Any:
    return (selection.part(args[0], "joint"), *args[1:]), kwargs


def _complete(selection: TokenSelection, output: Float[Tensor, "r l c"]) -> Tensor:
    """Return the output of all image tokens, after the text tokens of each row."""
    output = selection.whole(output, "joint", ends=True)
    _, _, _, starts, full_lengths = selection.per_context["tables"]
    lengths = selection.per_context["lengths"]
    fresh = torch.stack(
        [output[r, a:b] for r, (a, b) in enumerate(zip(starts, lengths, strict=True))]
    )
    full = selection.fill(fresh)
    if selection.index is None:
        return output
    lengths[:] = full_lengths
    result = output.new_zeros(output.shape[0], max(full_lengths), output.shape[2])
    for r, (a, b) in enumerate(zip(starts, full_lengths, strict=True)):
        result[r, a:b] = full[r]
    return result


def _shrink_text(selection: TokenSelection, args: tuple, kwargs: dict) -> Any:
    """Let the refiners run on one token if the refined text of this context is stored."""
    if "refined" in selection.per_context:
        text, _, table = args
        args = (text[:, :1], None, table[:, :1])
    return args, kwargs


def _refined_text(selection: TokenSelection, output: Tensor) -> Tensor:
    return selection.per_context.setdefault("refined", output)


class Lumina2SparseAttnProcessor(SparseProcessor):
    """Processor of attention over [text, image], or over image tokens in the noise refiner."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b l c"],
        encoder_hidden_states: Tensor,
        attention_mask: Bool[Tensor, "b m"] | None = None,
        image_rotary_emb: Tensor | None = None,
        base_sequence_length: int | None = None,
    ) -> Float[Tensor, "b l c"]:
        head_dim = attn.inner_dim // attn.heads
        query, key, value = (
            layer(hidden_states).unflatten(2, (-1, head_dim))
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        dtype = query.dtype
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, use_real=False)
            key = apply_rotary_emb(key, image_rotary_emb, use_real=False)
        query, key = query.to(dtype), key.to(dtype)

        def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            return grouped_attention(q, k, v, _full_mask(attention_mask, k.shape[1]), scale)

        padding = None if attention_mask is None else (~attention_mask).sum(1)
        out = self.run(
            query,
            key,
            value,
            dense,
            text="first",
            padding=padding,
            scale=attn.scale,
            base_length=base_sequence_length,
        )
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


def _full_mask(mask: Tensor | None, length: int) -> Tensor | None:
    """Return the mask of full sequences, given the mask of the tokens that run."""
    if mask is None or mask.shape[1] == length:
        return mask
    # The padding is at the end of a row, and has the same length in both sequences.
    valid = length - (~mask).sum(1, keepdim=True)
    return torch.arange(length, device=mask.device) < valid
