"""Wan2.2 TI2V 5B: one timestep for each token, and a VAE that makes 16 pixels one latent position."""

import torch

from ..random_pipelines import liven, scheduler
from .wan22 import CONTEXTS, blocks, embeddings
from .wan22 import arguments as of_14b

__all__ = ["CONTEXTS", "blocks", "embeddings"]

GRID = (3, 7, 9)
SIZES = ({"height": 160, "width": 224}, {"height": 96, "width": 416, "num_frames": 5})


def make(solver, image_to_video=True):
    from diffusers import (
        AutoencoderKLWan,
        WanImageToVideoPipeline,
        WanPipeline,
        WanTransformer3DModel,
    )

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=8,
        out_channels=8,
        text_dim=24,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=8,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
    ).eval()
    cls = WanImageToVideoPipeline if image_to_video else WanPipeline
    return cls(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=liven(transformer),
        scheduler=scheduler(solver),
        expand_timesteps=True,
    )


def arguments(prompts, guidance):
    picture = torch.rand(1, 3, 224, 288, generator=torch.Generator().manual_seed(5))
    size = {"height": 224, "width": 288, "image": picture}
    return of_14b(prompts, guidance) | size
