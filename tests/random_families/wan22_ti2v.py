"""Wan2.2 TI2V 5B: one timestep for each token, and a VAE with a spatial factor of 16."""

import torch

from ..random_pipelines import scheduler, video_vae, wan_transformer
from .wan22 import CONTEXTS, blocks, embeddings
from .wan22 import arguments as of_14b

__all__ = ["CONTEXTS", "blocks", "embeddings"]

GRID = (3, 7, 9)
SIZES = ({"height": 160, "width": 224}, {"height": 96, "width": 416, "num_frames": 5})


def make(solver, image_to_video=True):
    from diffusers import WanImageToVideoPipeline, WanPipeline

    vae = video_vae(
        8,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
    )
    cls = WanImageToVideoPipeline if image_to_video else WanPipeline
    return cls(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=wan_transformer(in_channels=8, out_channels=8),
        scheduler=scheduler(solver),
        expand_timesteps=True,
    )


def arguments(prompts, guidance):
    picture = torch.rand(1, 3, 224, 288, generator=torch.Generator().manual_seed(5))
    size = {"height": 224, "width": 288, "image": picture}
    return of_14b(prompts, guidance) | size
