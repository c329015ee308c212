"""LTX-Video."""

import torch

from ..random_pipelines import liven, scheduler

GRID = (3, 7, 9)
SIZES = (
    {"height": 160, "width": 352, "num_frames": 9},
    {"height": 288, "width": 224, "num_frames": 25},
)
CONTEXTS = 1


def make(solver="euler", cls=None, **changed):
    """Return the pipeline, or another pipeline class with the same components."""
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    torch.manual_seed(0)
    config = {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "num_layers": 3,
        "caption_channels": 24,
    }
    transformer = LTXVideoTransformer3DModel(**config | changed)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    ).eval()
    return (cls or LTXPipeline)(
        transformer=liven(transformer),
        scheduler=scheduler(solver),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
    )


def embeddings(prompts):
    rows = [torch.randn(12, 24, generator=torch.Generator().manual_seed(100 + i)) for i in prompts]
    lengths = torch.tensor([[5 + abs(i)] for i in prompts])
    return {
        "prompt_embeds": torch.stack(rows),
        "prompt_attention_mask": (torch.arange(12) < lengths).long(),
    }


def arguments(prompts, guidance):
    negative = {f"negative_{k}": x for k, x in embeddings([-3] * len(prompts)).items()}
    size = {"height": 224, "width": 288, "num_frames": 17}
    return {**negative, **size, "guidance_scale": guidance}


def blocks(transformer):
    return transformer.transformer_blocks
