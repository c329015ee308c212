"""One training step of the stills' diffusion transformer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..config import ImageRecipe
from .model import Captions


def flow_matching_loss(
    model: nn.Module,
    latents: Float[Tensor, "n z h w"],
    captions: Captions,
    config: ImageRecipe,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of the velocity on a batch drawn from a pool of latents, one a caption."""
    count = config.dit_batch_size
    rows = torch.randint(len(latents), (count,), generator=generator)
    noise = torch.randn(count, *latents.shape[1:], generator=generator, dtype=torch.float32)
    level = torch.sigmoid(1.1 * torch.randn(count, generator=generator, dtype=torch.float32))
    empty = torch.rand(count, generator=generator, dtype=torch.float32) < config.caption_dropout

    device = latents.device
    sigma = (config.shift * level / (1 + (config.shift - 1) * level)).to(device)
    noise, clean = noise.to(device), latents[rows.to(device)]
    mix = sigma[:, None, None, None]
    noisy = (1 - mix) * clean + mix * noise
    with torch.autocast(device.type, torch.bfloat16):
        velocity = captions.velocity(model, noisy, sigma, captions.rows[rows], empty, generator)
    return (velocity.float() - (noise - clean)).square().mean()
