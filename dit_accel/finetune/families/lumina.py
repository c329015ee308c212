"""Fine-tuning of Lumina-Next."""

import functools
import math
from collections.abc import Collection
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch import Tensor
from torch.nn.functional import pad

from dit_accel.finetune.families.base import Conditions, Trainable

GUIDED_CHANNELS = 3
"""Number of channels to which the pipeline applies guidance. Further channels stay conditional."""


class LuminaTrainable(Trainable):
    """Interface for Lumina-Next. Its time runs from noise (0) to image (1), and its output has the opposite sign."""

    name = "lumina"
    default_text_tokens = 256
    blocks = ("layers",)
    checkpointed = ()

    @classmethod
    def without_gradient(cls, transformer: Any) -> Collection[str]:
        return ("pad_token",)  # diffusers never uses this parameter

    def _encode_prompts(self, prompts: list[str]) -> Conditions:
        return self._padded(*self._encoded(prompts, guidance=False)[:2])

    def _encode_null(self) -> Conditions:
        return self._padded(*self._encoded([""], guidance=True)[2:])

    def _encoded(self, prompts: list[str], *, guidance: bool) -> Any:
        # The pipeline uses this attribute and ignores the argument of the same name.
        self.pipe.max_sequence_length = self.text_tokens
        return self.pipe.encode_prompt(prompts, guidance, clean_caption=True)

    def _padded(self, text: Tensor, mask: Tensor) -> Conditions:
        # The pipeline pads to the longest prompt of a call, rounded up to 8. Pad to a constant length instead:
        # masked tokens do not affect the output.
        missing = -(-self.text_tokens // 8) * 8 - text.shape[1]
        return {
            "encoder_hidden_states": pad(text, (0, 0, 0, missing)),
            "encoder_mask": pad(mask, (0, missing)),
        }

    def _normalise(self, latents: Tensor) -> Tensor:
        return latents * self.pipe.vae.config.scaling_factor  # the pipeline applies no shift

    def _velocity(
        self, model: Any, noisy_latents: Tensor, sigmas: Tensor, conditions: Conditions
    ) -> Tensor:
        config = self.transformer.config
        head_dim = config.hidden_size // config.num_attention_heads
        image_size = config.sample_size * self.pipe.vae_scale_factor
        height, width = (n * self.pipe.vae_scale_factor for n in noisy_latents.shape[2:])
        output = model(
            hidden_states=noisy_latents,
            timestep=1 - sigmas,
            image_rotary_emb=_rotary_table(head_dim, math.sqrt(width * height / image_size**2)),
            cross_attention_kwargs={"base_sequence_length": (image_size // 16) ** 2},
            return_dict=False,
            **conditions,
        )[0]
        return -output.chunk(2, dim=1)[
            0
        ]  # the second half is a variance, which the pipeline ignores

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        guided = super().guide(conditional, unconditional, scale)
        return torch.cat([guided[:, :GUIDED_CHANNELS], conditional[:, GUIDED_CHANNELS:]], dim=1)

    def example_conditions(self, batch_size: int, device: str = "meta") -> Conditions:
        tokens = -(-self.text_tokens // 8) * 8
        width = self.transformer.config.cross_attention_dim
        return {
            "encoder_hidden_states": torch.empty(batch_size, tokens, width, device=device),
            "encoder_mask": torch.ones(batch_size, tokens, dtype=torch.int64, device=device),
        }


@functools.lru_cache(maxsize=8)
def _rotary_table(head_dim: int, scaling: float) -> Tensor:
    """Return the rotary table that the pipeline uses for every sigma (times below its `scaling_watershed` of 1)."""
    return get_2d_rotary_pos_embed_lumina(head_dim, 384, 384, linear_factor=scaling, ntk_factor=1.0)
