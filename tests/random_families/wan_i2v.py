"""Wan2.1 image-to-video 14B: image tokens in addition to the text, and condition channels in addition to the noise."""

import torch

from ..random_pipelines import scheduler, video_vae, wan_transformer
from .wan22 import CONTEXTS, GRID, SIZES, blocks
from .wan22 import arguments as of_14b

__all__ = ["CONTEXTS", "GRID", "SIZES", "blocks"]

TEXT_TOKENS = 512
IMAGE_TOKENS = 257


def make(solver, **config):
    from diffusers import WanImageToVideoPipeline

    settings = {"in_channels": 12, "image_dim": 20, "added_kv_proj_dim": 24}
    pipe = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=video_vae(),
        transformer=wan_transformer(**settings | config),
        scheduler=scheduler(solver),
    )
    pipe.encode_image = encode_image
    return pipe


def encode_image(image, device):
    """Return random embeddings in place of an image encoder, one row for each picture."""
    rows = len(image) if isinstance(image, list) else 1
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, IMAGE_TOKENS, 20, generator=generator)


def embeddings(prompts):
    generators = [torch.Generator().manual_seed(100 + i) for i in prompts]
    return {
        "prompt_embeds": torch.stack(
            [torch.randn(TEXT_TOKENS, 24, generator=g) for g in generators]
        )
    }


def arguments(prompts, guidance):
    negative = embeddings([-3] * len(prompts))["prompt_embeds"]
    picture = torch.rand(1, 3, 112, 144, generator=torch.Generator().manual_seed(6))
    return of_14b(prompts, guidance) | {"negative_prompt_embeds": negative, "image": picture}
