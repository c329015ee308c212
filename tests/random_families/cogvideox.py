"""CogVideoX with rotary embeddings, like the 5B models. Its schedulers predict v."""

import torch

from ..random_pipelines import liven, scheduler

GRID = (3, 7, 9)
SIZES = (
    {"height": 80, "width": 176, "num_frames": 8},
    {"height": 144, "width": 112, "num_frames": 17},
)
CONTEXTS = 1
CHANNEL_AXIS = 2


def make(solver="euler", cls=None, **changed):
    """Return the pipeline, or another pipeline class with the same components. "euler" stands for DDIM: flow matching lacks what the pipeline reads."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    torch.manual_seed(0)
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 24,
        "num_layers": 3,
        "sample_width": 18,
        "sample_height": 14,
        "sample_frames": 9,
        "max_text_seq_length": 12,
        "use_rotary_positional_embeddings": True,
    }
    transformer = CogVideoXTransformer3DModel(**config | changed)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()
    ddim = {
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
    }
    return (cls or CogVideoXPipeline)(
        transformer=liven(transformer),
        scheduler=CogVideoXDDIMScheduler(**ddim) if solver == "euler" else scheduler(solver),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
    )


def embeddings(prompts):
    rows = [torch.randn(12, 24, generator=torch.Generator().manual_seed(100 + i)) for i in prompts]
    return {"prompt_embeds": torch.stack(rows)}


def arguments(prompts, guidance):
    negative = {f"negative_{k}": x for k, x in embeddings([-3] * len(prompts)).items()}
    size = {"height": 112, "width": 144, "num_frames": 9}
    return {**negative, **size, "guidance_scale": guidance}


def blocks(transformer):
    return transformer.transformer_blocks
