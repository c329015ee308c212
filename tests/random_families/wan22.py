"""Wan2.2 14B: a transformer for high noise and one for low noise."""

from ..random_pipelines import embeddings as texts
from ..random_pipelines import wan

GRID = (3, 7, 9)
SIZES = ({"height": 80, "width": 112}, {"height": 48, "width": 208, "num_frames": 5})
CONTEXTS = 2
RUNS = 2


def make(solver):
    import torch
    from diffusers import WanPipeline

    one, two = wan(solver), wan(solver)
    with torch.no_grad():
        for parameter in two.transformer.parameters():
            parameter.mul_(1.1)
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=one.vae,
        scheduler=one.scheduler,
        transformer=one.transformer,
        transformer_2=two.transformer,
        boundary_ratio=0.8,
    )


def embeddings(prompts):
    return texts("wan", prompts)


def arguments(prompts, guidance):
    negative = embeddings([-3] * len(prompts))
    return {
        "negative_prompt_embeds": negative["prompt_embeds"],
        "guidance_scale": guidance,
        "height": 112,
        "width": 144,
        "num_frames": 9,
    }


def blocks(transformer):
    return transformer.blocks
