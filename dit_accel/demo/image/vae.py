"""The stills' VAE: an AutoencoderKL of 4x4 stride whose latents come out normalised."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

STRIDE = 4
LATENT_CHANNELS = 4
POSTERIOR_STD = 0.05  # constant, in units of the latents


def build_vae(base_dim: int = 16, seed: int = 0) -> Any:
    """An AutoencoderKL of .6 M parameters at base_dim 16: 4x4 in space, 4 latent channels."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(base_dim, 2 * base_dim, 4 * base_dim),
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=4,
            sample_size=64,
            mid_block_add_attention=False,  # nothing here is far from what explains it
            scaling_factor=1.0,
            shift_factor=0.0,
        )


def encode(vae: Any, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b z lh lw"]:
    """The posterior's mean."""
    return vae.encode(images).latent_dist.mean


@torch.no_grad()
def normalise(vae: Any, latents: Float[Tensor, "n z lh lw"]) -> None:
    """Gives each latent channel mean 0 and standard deviation 1, measured on `latents`, and the
    posterior a constant width.

    The scale goes into the two 1x1 convolutions at the latents, exactly, so that the pipeline's one
    scaling factor for all channels can be 1.
    """
    channels = latents.shape[1]
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    encoder, decoder = vae.quant_conv, vae.post_quant_conv
    encoder.weight[:channels] /= std[:, None, None, None]
    encoder.bias[:channels] = (encoder.bias[:channels] - mean) / std
    encoder.weight[channels:] = 0
    encoder.bias[channels:] = 2 * math.log(POSTERIOR_STD)
    decoder.bias += decoder.weight[:, :, 0, 0] @ mean
    decoder.weight *= std[:, None, None]
