"""Stable Diffusion 3 and 3.5 (`SD3Transformer2DModel`): facts, and the joint attention processor."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dit_accel.models.attention import (
    SparseProcessor,
    grouped_attention,
    head_projections,
    text_projections,
)
from dit_accel.models.call import Call
from dit_accel.models.family import AttentionLayer, Family
from dit_accel.models.hooks import Hook, after
from dit_accel.models.selection import TokenSelection


class StableDiffusion3(Family):
    """Joint attention over [image, text]; guidance halves [uncond, cond] in one batch."""

    name = "Stable Diffusion 3"
    separate_guidance = False
    repeated_blocks = ("JointTransformerBlock",)
    stock_processors = ("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0")

    def self_attention(self, transformer: Any) -> dict[str, AttentionLayer]:
        layers = {}
        for i, block in enumerate(transformer.transformer_blocks):
            for name in ("attn", "attn2"):
                module = getattr(block, name)
                if module is not None:
                    head_dim = module.inner_kv_dim // module.heads
                    layers[f"transformer_blocks.{i}.{name}"] = AttentionLayer(
                        module, module.heads, head_dim
                    )
        return layers

    def processor(self, stock: Any) -> Any:
        return SD3SparseAttnProcessor(stock)

    def call(self, transformer: Any, arguments: dict[str, Any]) -> Call:
        if "ip_adapter_image_embeds" in (arguments.get("joint_attention_kwargs") or {}):
            raise ValueError(
                "ip_adapter_image_embeds: IP-Adapter does not work with acceleration; disable() first"
            )
        skipped = arguments.get("skip_layers")
        hidden_states = arguments["hidden_states"]
        return Call(
            hidden_states,
            arguments["encoder_hidden_states"],
            transformer.config.in_channels,
            self.token_grid(transformer, hidden_states),
            arguments.get("timestep"),
            # Skip-layer guidance makes a third call with the same text.
            variant=None if skipped is None else tuple(skipped),
        )

    def select_inputs(self, selection: TokenSelection, arguments: dict[str, Any]) -> dict[str, Any]:
        residuals = arguments.get("block_controlnet_hidden_states")
        if residuals is None:
            return arguments
        return {
            **arguments,
            "block_controlnet_hidden_states": [selection.take(x) for x in residuals],
        }

    def hooks(self, transformer: Any, selection: TokenSelection) -> list[Hook]:
        return [
            after(transformer.pos_embed, selection.take),
            after(transformer.context_embedder, selection.part),
            after(transformer.proj_out, selection.complete),
        ]

    def flops(self, transformer: Any, active: int, tokens: int, text: int) -> float:
        config = transformer.config
        dim = config.num_attention_heads * config.attention_head_dim
        total = 0.0
        for block in transformer.transformer_blocks:
            rows = active + text
            total += (
                3 * rows * dim * dim + 2 * rows * (tokens + text) * dim + 9 * active * dim * dim
            )
            if not block.context_pre_only:
                total += 9 * text * dim * dim
            if block.attn2 is not None:
                total += 4 * active * dim * dim + 2 * active * tokens * dim
        ends = config.patch_size**2 * (
            config.in_channels * tokens + transformer.out_channels * active
        )
        return 2.0 * (total + dim * (ends + text * config.joint_attention_dim))


class SD3SparseAttnProcessor(SparseProcessor):
    """Processor of attention over [image, text], or over the image alone (`attn2` of SD3.5).

    Only image tokens pass the seam `kv_store`. The text is computed anew in every step.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b l c"],
        encoder_hidden_states: Float[Tensor, "b t c"] | None = None,
        attention_mask: None = None,
    ) -> Any:
        active = hidden_states.shape[1]
        query, key, value = head_projections(attn, hidden_states)
        text_tokens, where = 0, "none"
        if encoder_hidden_states is not None:
            text_tokens, where = encoder_hidden_states.shape[1], "last"
            text = text_projections(attn, encoder_hidden_states)
            query, key, value = (
                torch.cat([x, t], dim=1) for x, t in zip((query, key, value), text, strict=True)
            )
        out = self.run(query, key, value, grouped_attention, text=where, text_tokens=text_tokens)
        out = out.flatten(2).to(query.dtype)
        image = attn.to_out[1](attn.to_out[0](out[:, :active]))
        if encoder_hidden_states is None:
            return image
        written = out[:, active:]
        return image, written if attn.context_pre_only else attn.to_add_out(written)
