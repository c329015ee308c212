"""`StillModel`: the parts in which the image models differ, for the trainer that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

HEAD_DIM = 32
LATENT_SIDE = 16  # 16 x 16 = 256 image tokens


class Captions(ABC):
    """Text embeddings of a pool of captions and of the empty one, computed once."""

    rows: Tensor
    """Row of each caption of the pool in the tables of embeddings."""

    @abstractmethod
    def velocity(
        self,
        model: nn.Module,
        noisy: Float[Tensor, "n z h w"],
        sigma: Float[Tensor, " n"],
        rows: Tensor,
        empty: Tensor,
        generator: torch.Generator,
    ) -> Float[Tensor, "n z h w"]:
        """Call the transformer as its pipeline does and return what the scheduler gets, noise minus image.

        Args:
            model: the transformer.
            noisy: latents at these noise levels.
            sigma: noise levels in [0, 1].
            rows: rows of the captions.
            empty: samples that get the empty caption instead.
            generator: for random choices of the pipeline's arguments.
        """

    @staticmethod
    def index(captions: list[str]) -> tuple[list[str], Tensor]:
        """Return the distinct captions, and the position of each caption among them."""
        distinct = list(dict.fromkeys(captions))
        position = {text: i for i, text in enumerate(distinct)}
        return distinct, torch.tensor([position[text] for text in captions])


@dataclass(frozen=True)
class StillModel:
    """One image model, as functions of its recipe."""

    pipeline: str
    """Class of diffusers."""
    side: int
    """Pixels a side of its images."""
    build_vae: Callable[[Any], Any]
    """Untrained VAE of a recipe."""
    build_transformer: Callable[[Any], Any]
    """Untrained transformer of a recipe."""
    build_text_parts: Callable[[int], dict[str, Any]]
    """Tokenizers and text encoders of a seed, by their names in the pipeline."""
    embed: Callable[[Any, list[str], torch.device, Any], Captions]
    """Text embeddings of captions, given the pipeline, the captions, the device and the recipe."""
