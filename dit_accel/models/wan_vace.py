"""Wan2.1 VACE (`WanVACETransformer3DModel`): Wan with control blocks."""

import math
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from dit_accel.models.hooks import Hook, after
from dit_accel.models.selection import TokenSelection
from dit_accel.models.wan import Wan, dim_of, gathered


class WanVACE(Wan):
    """Wan with a second stream of control tokens, whose blocks run before the others.

    Each control token belongs to the video token at the same position. Both streams run on the same tokens.
    """

    name = "Wan VACE"

    def named_blocks(self, transformer: Any) -> dict[str, Any]:
        control = {f"vace_blocks.{i}": block for i, block in enumerate(transformer.vace_blocks)}
        return control | super().named_blocks(transformer)

    def hooks(self, transformer: Any, selection: TokenSelection) -> list[Hook]:
        embedded = after(transformer.vace_patch_embedding, _embedded, selection)
        return [*super().hooks(transformer, selection), embedded]

    def flops(self, transformer: Any, active: int, tokens: int, text: int) -> float:
        config, dim = transformer.config, dim_of(transformer)
        # Output projection of each control block, and the input projection of the first one.
        ends = active * dim * dim * (1 + len(config.vace_layers))
        ends += tokens * dim * math.prod(config.patch_size) * config.vace_in_channels
        return super().flops(transformer, active, tokens, text) + 2.0 * ends


def _embedded(selection: TokenSelection, output: Float[Tensor, "r c t h w"]) -> Tensor:
    """Return the control tokens that run. A control of fewer frames is padded with zeros, as in diffusers."""
    if selection.passes:
        return output
    tokens = output.flatten(2)
    missing = math.prod(selection.call.grid) - tokens.shape[2]
    return gathered(selection, pad(tokens, (0, missing)))
