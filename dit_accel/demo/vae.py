"""The demo's VAE: its configuration, and a whole-clip forward for training.

`AutoencoderKLWan.encode` and `decode` walk through a clip in chunks with a cache; a training step
is about 2.5 times faster over the whole clip at once, with the same result
(tests/demo/test_vae.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

SPATIAL_STRIDE, TEMPORAL_STRIDE = 8, 2
LATENT_CHANNELS = 8
POSTERIOR_STD = 0.05  # constant; training adds this much noise to the latents


def build_vae(base_dim: int = 32, seed: int = 0) -> Any:
    """An AutoencoderKLWan of .7 M parameters at base_dim 32: 8x8 in space, 2x in time, 8 latent
    channels."""
    from diffusers import AutoencoderKLWan

    patch_size = 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKLWan(
            base_dim=base_dim,
            decoder_base_dim=base_dim,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[True],
            is_residual=True,
            in_channels=3 * patch_size**2,
            out_channels=3 * patch_size**2,
            patch_size=patch_size,
            scale_factor_temporal=TEMPORAL_STRIDE,
            scale_factor_spatial=SPATIAL_STRIDE,
            latents_mean=[0.0] * LATENT_CHANNELS,
            latents_std=[1.0] * LATENT_CHANNELS,
        )


def _resample_whole_clip(
    layer: Any, x: Tensor, feat_cache: None = None, feat_idx: Any = None
) -> Tensor:
    """WanResample over all frames. As in the chunked walk, the first frame is left out of
    resampling in time."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        later = layer.time_conv(x[:, :, 1:])  # [b, 2c, t-1, h, w]: each frame becomes two
        later = later.unflatten(1, (2, x.shape[1])).movedim(1, 3).flatten(2, 3)
        x = torch.cat([x[:, :, :1], later], 2)
    frames = x.shape[2]
    x = layer.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, frames)).transpose(1, 2)
    if layer.mode == "downsample3d" and frames > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], 2)
    return x


@contextmanager
def whole_clip(vae: Any) -> Iterator[None]:
    """Inside, `encode_clip` and `decode_clip` may be used on this VAE; its own encode and decode
    may not."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample

    layers: list[Any] = [m for m in vae.modules() if isinstance(m, WanResample)]
    for layer in layers:
        layer.forward = partial(_resample_whole_clip, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # uncovers the class's own


def encode_clip(vae: Any, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b z lt lh lw"]:
    """The posterior's mean, as the VAE has it (not normalised); inside `whole_clip` only."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    moments = vae.quant_conv(vae.encoder(patchify(video, vae.config.patch_size)))
    return moments.chunk(2, dim=1)[0]


def decode_clip(vae: Any, latents: Float[Tensor, "b z lt lh lw"]) -> Float[Tensor, "b 3 t h w"]:
    """The decoded clip, not clamped; inside `whole_clip` only."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    return unpatchify(
        vae.decoder(vae.post_quant_conv(latents), first_chunk=True), vae.config.patch_size
    )


def latent_scale(vae: Any, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The configured mean and standard deviation of each latent channel, as [1, z, 1, 1, 1]."""
    mean, std = (
        torch.tensor(vae.config[name], device=device, dtype=torch.float32).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    return mean, std


@torch.no_grad()
def finish_encoder(vae: Any, latents: Float[Tensor, "n z lt lh lw"]) -> None:
    """Writes the measured latent statistics into the config and makes the posterior's width
    constant."""
    channels = vae.config.z_dim
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = 2 * math.log(POSTERIOR_STD)
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(
        latents_mean=[round(v, 4) for v in mean.tolist()],
        latents_std=[round(v, 4) for v in std.tolist()],
    )
