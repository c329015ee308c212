"""Wan2.1 image-to-video 14B: image tokens beside the text, and condition channels beside the noise."""

import torch

from ..random_pipelines import liven, scheduler, wan
from .wan22 import CONTEXTS, GRID, SIZES, blocks
from .wan22 import arguments as of_14b

__all__ = ["CONTEXTS", "GRID", "SIZES", "blocks"]

TEXT_TOKENS = 512
IMAGE_TOKENS = 257


def make(solver, **config):
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel

    torch.manual_seed(0)
    settings = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 12,
        "out_channels": 4,
        "text_dim": 24,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 3,
        "rope_max_seq_len": 32,
        "image_dim": 20,
        "added_kv_proj_dim": 24,
    }
    transformer = WanTransformer3DModel(**settings | config)
    pipe = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=wan().vae,
        transformer=liven(transformer),
        scheduler=scheduler(solver),
    )
    pipe.encode_image = encode_image
    return pipe


def encode_image(image, device):
    """Random embeddings in place of those of an image encoder, a row for each picture."""
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
