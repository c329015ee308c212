"""FLUX.1 with embedded guidance, like the dev model."""

import torch

from ..random_pipelines import image_vae, liven, scheduler

GRID = (1, 11, 13)
SIZES = ({"height": 144, "width": 240}, {"height": 208, "width": 176})
CONTEXTS = 2


def make(solver="euler", cls=None, *, guidance_embeds=True, in_channels=16, out_channels=None):
    """Return the pipeline, or another pipeline class with the same components."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=in_channels,
        out_channels=out_channels,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return (cls or FluxPipeline)(
        transformer=liven(transformer), scheduler=scheduler(solver), vae=image_vae(4), **parts
    )


def embeddings(prompts):
    rows = [torch.randn(12, 24, generator=torch.Generator().manual_seed(100 + i)) for i in prompts]
    rows = torch.stack(rows)
    return {"prompt_embeds": rows, "pooled_prompt_embeds": rows.flatten(1)[:, :16].clone()}


def arguments(prompts, guidance):
    negative = {f"negative_{k}": x for k, x in embeddings([-3] * len(prompts)).items()}
    return {**negative, "height": 176, "width": 208, "true_cfg_scale": guidance}


def blocks(transformer):
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
