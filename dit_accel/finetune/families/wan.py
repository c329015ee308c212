"""Fine-tuning of Wan2.1 text-to-video."""

import math
from typing import Any

import torch
from torch import Tensor

from dit_accel.finetune.families.base import Conditions, Trainable


class WanTrainable(Trainable):
    """Interface for Wan2.1 text-to-video."""

    name = "wan"
    default_text_tokens = 512
    blocks = ("blocks",)
    checkpointed = ("blocks",)

    def __init__(self, pipe: Any, **kwargs: Any) -> None:
        super().__init__(pipe, **kwargs)
        self.frames_rule = (pipe.vae_scale_factor_temporal, 1)

    @classmethod
    def check(cls, transformer: Any) -> None:
        config = transformer.config
        if config.in_channels != config.out_channels:
            raise ValueError(
                f"transformer: has in_channels={config.in_channels} and out_channels={config.out_channels}, as for "
                "image-to-video; expected a text-to-video model"
            )

    @property
    def size_multiple(self) -> int:
        _, *patch = self.transformer.config.patch_size
        # The pipeline requires multiples of 16.

        return math.lcm(16, *(self.pipe.vae_scale_factor_spatial * p for p in patch))

    def _encode_prompts(self, prompts: list[str]) -> Conditions:
        text, _ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
        )
        return {"encoder_hidden_states": text}

    def _normalise(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        mean, std = (
            latents.new_tensor(x).view(1, -1, 1, 1, 1)
            for x in (config.latents_mean, config.latents_std)
        )
        return (latents - mean) / std

    def example_conditions(self, batch_size: int, device: str = "meta") -> Conditions:
        width = self.transformer.config.text_dim
        return {
            "encoder_hidden_states": torch.empty(batch_size, self.text_tokens, width, device=device)
        }
