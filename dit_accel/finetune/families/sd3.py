"""Fine-tuning of Stable Diffusion 3 and 3.5."""

from collections.abc import Collection
from typing import Any

import torch

from dit_accel.finetune.families.base import Conditions, Trainable

CLIP_TOKENS = 77
"""Number of text tokens of the CLIP encoders if the pipeline does not define it. T5 tokens follow them."""


class StableDiffusion3Trainable(Trainable):
    """Interface for Stable Diffusion 3 and 3.5."""

    name = "sd3"
    default_text_tokens = 256
    adapted = (*Trainable.adapted, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    blocks = ("transformer_blocks",)
    checkpointed = ("transformer_blocks",)

    @classmethod
    def without_gradient(cls, transformer: Any) -> Collection[str]:
        # The last block discards its text output, so its text queries receive no gradient.
        attn = f"transformer_blocks.{transformer.config.num_layers - 1}.attn"
        return f"{attn}.add_q_proj.", f"{attn}.norm_added_q."

    def _encode_prompts(self, prompts: list[str]) -> Conditions:
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_tokens,
        )
        return {"encoder_hidden_states": text, "pooled_projections": pooled}

    def example_conditions(self, batch_size: int, device: str = "meta") -> Conditions:
        config = self.transformer.config
        tokens = getattr(self.pipe, "tokenizer_max_length", CLIP_TOKENS) + self.text_tokens
        return {
            "encoder_hidden_states": torch.empty(
                batch_size, tokens, config.joint_attention_dim, device=device
            ),
            "pooled_projections": torch.empty(
                batch_size, config.pooled_projection_dim, device=device
            ),
        }
