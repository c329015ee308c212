"""Qwen-Image."""

import torch

from ..random_pipelines import liven, scheduler, video_vae

GRID = (1, 11, 13)
SIZES = ({"height": 144, "width": 240}, {"height": 208, "width": 176})
CONTEXTS = 2


def make(solver="euler", cls=None, **changed):
    """Return the pipeline, or another pipeline class with the same components."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 8),
        **changed,
    )
    vae = video_vae(cls=AutoencoderKLQwenImage)
    return (cls or QwenImagePipeline)(
        transformer=liven(transformer),
        scheduler=scheduler(solver),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
    )


def embeddings(prompts):
    """Return texts of 12 tokens; those of odd numbers have 9 tokens and padding."""
    rows = [torch.randn(12, 24, generator=torch.Generator().manual_seed(100 + i)) for i in prompts]
    mask = torch.stack([(torch.arange(12) < 12 - 3 * (i % 2)).long() for i in prompts])
    return {"prompt_embeds": torch.stack(rows), "prompt_embeds_mask": mask}


def arguments(prompts, guidance):
    negative = {f"negative_{k}": x for k, x in embeddings([-3] * len(prompts)).items()}
    return {**negative, "height": 176, "width": 208, "true_cfg_scale": guidance}


def blocks(transformer):
    return transformer.transformer_blocks
