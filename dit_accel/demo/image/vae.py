"""The stills' VAE: an AutoencoderKL whose latents come out normalised."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .model import LATENT_SIDE

LATENT_CHANNELS = 4
POSTERIOR_STD = 0.05  # constant, in units of the latents


def build_vae(base_dim: int = 16, seed: int = 0) -> Any:
    """An AutoencoderKL of .6 M parameters at base_dim 16: 4x4 in space, 4 latent channels."""
    return _build((base_dim, 2 * base_dim, 4 * base_dim), seed)


def _build(channels: tuple[int, ...], seed: int) -> Any:
    """An AutoencoderKL with these channels, from full resolution to that of the latents."""
    from diffusers import AutoencoderKL

    levels = len(channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=channels,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=4,
            sample_size=LATENT_SIDE * 2 ** (levels - 1),
            mid_block_add_attention=False,  # nothing here is far from what explains it
            scaling_factor=1.0,
            shift_factor=0.0,
        )


@torch.no_grad()
def double_vae(vae: Any, seed: int = 0) -> Any:
    """Return a VAE of twice the stride, for images of twice the sides, that starts from a trained one.

    A level at full resolution is added outside the given levels. At first it halves images by averaging, and
    doubles what the decoder draws by repeating pixels; its residual blocks start as the identity.
    """
    channels = vae.config.block_out_channels
    doubled = _build((channels[0], *channels), seed)
    weights = {}
    for name, value in vae.state_dict().items():
        if name.startswith("encoder.down_blocks."):  # numbered from full resolution inwards
            side, blocks, number, rest = name.split(".", 3)
            name = f"{side}.{blocks}.{int(number) + 1}.{rest}"
        weights[name] = value
    unexpected = doubled.load_state_dict(weights, strict=False).unexpected_keys
    assert not unexpected, unexpected
    outer = (doubled.encoder.down_blocks[0], doubled.decoder.up_blocks[-1])
    for block in (x for level in outer for x in level.resnets):
        nn.init.zeros_(block.conv2.weight)
        nn.init.zeros_(block.conv2.bias)
    one = torch.eye(channels[0])
    halving = doubled.encoder.down_blocks[0].downsamplers[0].conv
    doubling = doubled.decoder.up_blocks[-2].upsamplers[0].conv
    for convolution in (halving, doubling):
        nn.init.zeros_(convolution.weight)
        nn.init.zeros_(convolution.bias)
    halving.weight[:, :, :2, :2] = one[:, :, None, None] / 4  # two by two pixels
    doubling.weight[:, :, 1, 1] = one
    return doubled


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
