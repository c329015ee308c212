"""The stills' diffusion transformer and one training step."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..config import ImageTrainConfig
from .stills import HEIGHT
from .text import TEXT_DIM, StillCaptions
from .vae import LATENT_CHANNELS, STRIDE

# T5's padded lengths (max_sequence_length): short in most steps, and the pipeline's default.
SHORT_TEXT, LONG_TEXT = 16, 256
HEAD_DIM = 32
MAX_SIDE = 32  # latent positions a side, at most


def _position_table(size: int, width: int) -> Float[Tensor, "1 size2 width"]:
    """Sines and cosines of both coordinates, at wavelengths from 4 to 128 tokens.

    The model's own go up to 60,000 tokens: over 16, most of them are constant.
    """
    angles = torch.arange(size)[:, None] * math.pi / torch.logspace(1, 6, width // 4, base=2.0)
    one = torch.cat([angles.sin(), angles.cos()], 1)  # [size, width / 2]
    down, across = one[:, None].expand(-1, size, -1), one[None].expand(size, -1, -1)
    return torch.cat([across, down], -1).reshape(1, size * size, width)


def build_transformer(config: ImageTrainConfig) -> Any:
    """An SD3Transformer2DModel with one token a latent position.

    Its output starts at zero, and what the time and the caption do to a block starts as a gate of
    one, so that the blocks learn from the first steps on.
    """
    from diffusers import SD3Transformer2DModel

    width = HEAD_DIM * config.num_heads
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model: Any = SD3Transformer2DModel(
            sample_size=HEIGHT // STRIDE,
            patch_size=1,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=config.num_layers,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=config.num_heads,
            joint_attention_dim=TEXT_DIM,
            caption_projection_dim=width,
            pooled_projection_dim=TEXT_DIM,
            pos_embed_max_size=MAX_SIDE,
            qk_norm="rms_norm",
        )
    model.pos_embed.pos_embed.copy_(_position_table(MAX_SIDE, width))
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    for block in model.transformer_blocks:
        # The first head starts with equal queries and keys, so it attends to what is near and alike.
        block.attn.to_k.weight.data[:HEAD_DIM] = block.attn.to_q.weight.data[:HEAD_DIM]
        block.attn.to_k.bias.data[:HEAD_DIM] = block.attn.to_q.bias.data[:HEAD_DIM]
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
            if len(norm.linear.bias) == 6 * width:
                nn.init.ones_(norm.linear.bias.data[2 * width : 3 * width])  # attention's gate
                nn.init.ones_(norm.linear.bias.data[5 * width :])  # the feed-forward's
    return model


def flow_matching_loss(
    model: nn.Module,
    latents: Float[Tensor, "n z h w"],
    captions: StillCaptions,
    config: ImageTrainConfig,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of the velocity on a batch drawn from a pool of latents, one a caption."""
    count = config.dit_batch_size
    rows = torch.randint(len(latents), (count,), generator=generator)
    noise = torch.randn(count, *latents.shape[1:], generator=generator, dtype=torch.float32)
    level = torch.sigmoid(1.1 * torch.randn(count, generator=generator, dtype=torch.float32))
    empty = torch.rand(count, generator=generator, dtype=torch.float32) < config.caption_dropout
    long_text = (
        torch.rand((), generator=generator, dtype=torch.float32).item() < config.long_text_share
    )

    device = latents.device
    sigma = (config.shift * level / (1 + (config.shift - 1) * level)).to(device)
    noise, clean = noise.to(device), latents[rows.to(device)]
    mix = sigma[:, None, None, None]
    states, pooled = captions.lookup(
        captions.rows[rows], empty, LONG_TEXT if long_text else SHORT_TEXT
    )
    with torch.autocast(device.type, torch.bfloat16):
        velocity = model(
            (1 - mix) * clean + mix * noise, states, pooled, sigma * 1000, return_dict=False
        )[0]
    return (velocity.float() - (noise - clean)).square().mean()
