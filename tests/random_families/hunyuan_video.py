"""HunyuanVideo, with texts of different lengths that are padded at their ends."""

import torch

from ..random_pipelines import liven, scheduler

GRID = (3, 7, 9)
SIZES = (
    {"height": 80, "width": 176, "num_frames": 5},
    {"height": 144, "width": 112, "num_frames": 13},
)
CONTEXTS = 2


def make(solver="euler", cls=None, **changed):
    """Return the pipeline, or another pipeline class with the same components."""
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )

    torch.manual_seed(0)
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "patch_size_t": 1,
        "text_embed_dim": 24,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 6, 6),
    }
    transformer = HunyuanVideoTransformer3DModel(**config | changed)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return (cls or HunyuanVideoPipeline)(
        transformer=liven(transformer), vae=vae, scheduler=scheduler(solver), **parts
    )


def embeddings(prompts):
    rows = [torch.randn(12, 24, generator=torch.Generator().manual_seed(100 + i)) for i in prompts]
    rows = torch.stack(rows)
    lengths = torch.tensor([[5 + abs(i)] for i in prompts])
    return {
        "prompt_embeds": rows,
        "pooled_prompt_embeds": rows.flatten(1)[:, :8].clone(),
        "prompt_attention_mask": (torch.arange(12) < lengths).float(),
    }


def arguments(prompts, guidance):
    negative = {f"negative_{k}": x for k, x in embeddings([-3] * len(prompts)).items()}
    size = {"height": 112, "width": 144, "num_frames": 9}
    return {**negative, **size, "true_cfg_scale": guidance}


def blocks(transformer):
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
