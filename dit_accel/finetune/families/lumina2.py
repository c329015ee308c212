"""Fine-tuning of Lumina-Image 2.0."""

from typing import Any

import torch
from torch import Tensor

from dit_accel.finetune.families.base import Conditions, Trainable


class Lumina2Trainable(Trainable):
    """Interface for Lumina-Image 2.0. Its time runs from noise (0) to image (1), and its output has the opposite sign."""

    name = "lumina2"
    default_text_tokens = 256
    blocks = ("noise_refiner", "context_refiner", "layers")
    checkpointed = ("layers",)

    def _encode_prompts(self, prompts: list[str]) -> Conditions:
        return _conditions(*self._encoded(prompts, guidance=False)[:2])

    def _encode_null(self) -> Conditions:
        # The pipeline prepends its system prompt only to prompts, not to the empty negative prompt.
        return _conditions(*self._encoded([""], guidance=True)[2:])

    def _encoded(self, prompts: list[str], *, guidance: bool) -> Any:
        return self.pipe.encode_prompt(prompts, guidance, max_sequence_length=self.text_tokens)

    def _velocity(
        self, model: Any, noisy_latents: Tensor, sigmas: Tensor, conditions: Conditions
    ) -> Tensor:
        # Call the model once per row. Texts of different lengths in one call would need a mask, and dense attention
        # with a mask has no flash kernel. The number of calls is equal in all processes, as sharding requires.
        rows = [
            model(
                hidden_states=noisy_latents[i : i + 1],
                timestep=1 - sigmas[i : i + 1],
                return_dict=False,
                **{name: x[i : i + 1] for name, x in conditions.items()},
            )[0]
            for i in range(len(noisy_latents))
        ]
        return -torch.cat(rows)

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        guided = super().guide(conditional, unconditional, scale)
        # `cfg_normalization` of the pipeline, which is enabled by default.
        return guided * (_norm(conditional) / _norm(guided))

    def example_conditions(self, batch_size: int, device: str = "meta") -> Conditions:
        shape, width = (batch_size, self.text_tokens), self.transformer.config.cap_feat_dim
        return {
            "encoder_hidden_states": torch.empty(*shape, width, device=device),
            "encoder_attention_mask": torch.ones(shape, dtype=torch.int64, device=device),
        }


def _conditions(text: Tensor, mask: Tensor) -> Conditions:
    return {"encoder_hidden_states": text, "encoder_attention_mask": mask}


def _norm(x: Tensor) -> Tensor:
    return x.norm(dim=-1, keepdim=True)
