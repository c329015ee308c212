"""Wan2.1 VACE: a control stream in addition to the video."""

import torch

from ..random_pipelines import scheduler, video_vae, wan_transformer
from .wan22 import CONTEXTS, GRID, SIZES, arguments, embeddings

__all__ = ["CONTEXTS", "GRID", "SIZES", "arguments", "embeddings"]


def make(solver):
    from diffusers import WanVACEPipeline, WanVACETransformer3DModel

    transformer = wan_transformer(
        WanVACETransformer3DModel, vace_layers=[0, 2], vace_in_channels=2 * 4 + 64
    )
    pipe = WanVACEPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=video_vae(),
        transformer=transformer,
        scheduler=scheduler(solver),
    )
    # diffusers accepts one generator and one video in a call. Here each sample has a generator, and the control differs
    # between tokens.
    latents, masks = pipe.prepare_video_latents, pipe.prepare_masks

    def video_latents(video, mask, reference_images, generator, device):
        one = latents(video[:1], mask[:1], reference_images[:1], None, device)
        return one.expand(len(video), -1, -1, -1, -1)

    def random_masks(mask, reference_images, generator):
        shape = masks(mask[:1], reference_images[:1]).shape
        values = torch.randn(shape, generator=torch.Generator().manual_seed(4))
        return values.expand(len(mask), -1, -1, -1, -1)

    pipe.prepare_video_latents, pipe.prepare_masks = video_latents, random_masks
    return pipe


def blocks(transformer):
    return [*transformer.vace_blocks, *transformer.blocks]
