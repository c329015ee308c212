"""Autoencoders in training: whole clips at once, a further level, and normalised latents."""

import math
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

POSTERIOR_STD = 0.05  # constant, in units of the normalised latents


def use_whole_clips(vae: Any) -> None:
    """Let an AutoencoderKLWan encode and decode all frames at once, and decode without clamping.

    By default it walks through a clip in chunks with a cache. A training step on the whole clip is about 2.5
    times faster, with the same result.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
    from diffusers.models.autoencoders.vae import DecoderOutput

    def encode(x: Tensor) -> Tensor:
        return vae.quant_conv(vae.encoder(patchify(x, vae.config.patch_size)))

    def decode(z: Tensor) -> Any:
        x = vae.decoder(vae.post_quant_conv(z), first_chunk=True)
        return DecoderOutput(sample=unpatchify(x, vae.config.patch_size))

    vae._encode, vae._decode = encode, decode
    layers: list[Any] = [x for x in vae.modules() if isinstance(x, WanResample)]
    for layer in layers:
        layer.forward = partial(_resample, layer)


def _resample(layer: Any, x: Tensor, feat_cache: None = None, feat_idx: Any = None) -> Tensor:
    """Apply a WanResample to all frames. Resampling in time leaves the first frame out, as in chunks."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        later = layer.time_conv(x[:, :, 1:])  # [b, 2c, t-1, h, w]: each frame becomes two
        later = later.unflatten(1, (2, x.shape[1])).movedim(1, 3).flatten(2, 3)
        x = torch.cat([x[:, :, :1], later], 2)
    frames = x.shape[2]
    x = layer.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, frames)).transpose(1, 2)
    if layer.mode == "downsample3d" and frames > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], 2)
    return x


@torch.no_grad()
def double_vae(vae: Any, doubled: Any) -> None:
    """Initialise `doubled`, an AutoencoderKL with a further level at full resolution, from a trained one.

    The further level halves images by averaging, and doubles the output of the trained decoder by repeating
    pixels. Its residual blocks start as the identity.
    """
    weights = {}
    for name, value in vae.state_dict().items():
        if name.startswith("encoder.down_blocks."):  # numbered from full resolution inwards
            side, blocks, number, rest = name.split(".", 3)
            name = f"{side}.{blocks}.{int(number) + 1}.{rest}"
        weights[name] = value
    unexpected = doubled.load_state_dict(weights, strict=False).unexpected_keys
    assert not unexpected, unexpected
    outer = (doubled.encoder.down_blocks[0], doubled.decoder.up_blocks[-1])
    halving = doubled.encoder.down_blocks[0].downsamplers[0].conv
    doubling = doubled.decoder.up_blocks[-2].upsamplers[0].conv
    for conv in (*(block.conv2 for level in outer for block in level.resnets), halving, doubling):
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    one = torch.eye(len(halving.weight))
    halving.weight[:, :, :2, :2] = one[:, :, None, None] / 4  # two by two pixels
    doubling.weight[:, :, 1, 1] = one


@torch.no_grad()
def normalise(vae: Any, latents: Float[Tensor, "n z ..."]) -> None:
    """Give each latent channel mean 0 and standard deviation 1, and the posterior a constant width.

    The scale goes into the two convolutions of one position at the latents, so that the configuration of the
    autoencoder needs no scaling factors. Decoded images stay equal.
    `latents` are means of the posterior of many clips or stills.
    """
    channels, others = latents.shape[1], (0, *range(2, latents.ndim))
    mean, std = latents.mean(others), latents.std(others)
    column = std.view(-1, *[1] * (latents.ndim - 2))
    encoder, decoder = vae.quant_conv, vae.post_quant_conv
    encoder.weight[:channels] /= column[:, None]
    encoder.bias[:channels] = (encoder.bias[:channels] - mean) / std
    encoder.weight[channels:] = 0
    encoder.bias[channels:] = 2 * math.log(POSTERIOR_STD)
    decoder.bias += decoder.weight.flatten(1) @ mean
    decoder.weight *= column
