"""Tiny pipelines of models that forecast steps run on without a family file, with random weights and embeddings."""

import torch

from ..random_pipelines import liven

KINDS = ("flux", "qwen", "hunyuan", "ltx", "cogvideox", "wan22")


def text(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _parts(*names):
    return dict.fromkeys(names)


def flux():
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    vae = AutoencoderKL(
        sample_size=32,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    )
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae,
        **_parts("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        transformer=liven(transformer),
    )
    call = {
        "prompt_embeds": text(1, 6, 32),
        "pooled_prompt_embeds": text(1, 32, seed=1),
        "height": 16,
        "width": 16,
        "guidance_scale": 2.0,
        "max_sequence_length": 6,
    }
    return pipe, call, lambda t: t.transformer_blocks[0]


def qwen():
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe = QwenImagePipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae,
        **_parts("text_encoder", "tokenizer"),
        transformer=liven(transformer),
    )
    call = {
        "prompt_embeds": text(1, 6, 16),
        "prompt_embeds_mask": torch.ones(1, 6, dtype=torch.long),
        "negative_prompt_embeds": text(1, 6, 16, seed=1),
        "negative_prompt_embeds_mask": torch.ones(1, 6, dtype=torch.long),
        "true_cfg_scale": 2.0,
        "height": 32,
        "width": 32,
    }
    return pipe, call, lambda t: t.transformer_blocks[0]


def hunyuan():
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )

    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    vae = AutoencoderKLHunyuanVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        act_fn="silu",
        norm_num_groups=4,
        scaling_factor=0.476986,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        mid_block_add_attention=True,
    )
    pipe = HunyuanVideoPipeline(
        **_parts("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        transformer=liven(transformer),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    call = {
        "prompt_embeds": text(1, 6, 16),
        "pooled_prompt_embeds": text(1, 8, seed=1),
        "prompt_attention_mask": torch.ones(1, 6),
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "guidance_scale": 2.0,
    }
    return pipe, call, lambda t: t.transformer_blocks[0]


def ltx():
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=32,
    )
    vae = AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    pipe = LTXPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae,
        **_parts("text_encoder", "tokenizer"),
        transformer=liven(transformer),
    )
    call = {
        "prompt_embeds": text(1, 6, 32),
        "prompt_attention_mask": torch.ones(1, 6, dtype=torch.long),
        "negative_prompt_embeds": text(1, 6, 32, seed=1),
        "negative_prompt_attention_mask": torch.ones(1, 6, dtype=torch.long),
        "guidance_scale": 3.0,
        "height": 32,
        "width": 32,
        "num_frames": 9,
    }
    return pipe, call, lambda t: t.transformer_blocks[0]


def cogvideox():
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
    )
    vae = AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    pipe = CogVideoXPipeline(
        **_parts("tokenizer", "text_encoder"),
        vae=vae,
        transformer=liven(transformer),
        scheduler=CogVideoXDDIMScheduler(prediction_type="v_prediction"),
    )
    call = {
        "prompt_embeds": text(1, 16, 32),
        "negative_prompt_embeds": text(1, 16, 32, seed=1),
        "guidance_scale": 3.0,
        "height": 16,
        "width": 16,
        "num_frames": 8,
        "max_sequence_length": 16,
    }
    return pipe, call, lambda t: t.transformer_blocks[0]


def wan22():
    from diffusers import WanPipeline

    from ..random_pipelines import wan

    one, two = wan("unipc"), wan("unipc")
    with torch.no_grad():
        for parameter in two.transformer.parameters():
            parameter.mul_(1.1)
    pipe = WanPipeline(
        **_parts("tokenizer", "text_encoder"),
        vae=one.vae,
        scheduler=one.scheduler,
        transformer=one.transformer,
        transformer_2=two.transformer,
        boundary_ratio=0.8,
    )
    call = {
        "prompt_embeds": text(1, 12, 24),
        "negative_prompt_embeds": text(1, 12, 24, seed=1),
        "guidance_scale": 2.0,
        "height": 112,
        "width": 144,
        "num_frames": 9,
    }
    return pipe, call, lambda t: t.blocks[0]


def make(kind):
    torch.manual_seed(0)
    pipe, call, block = globals()[kind]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, call, block


def run(pipe, call, steps=16, **changed):
    generator = torch.Generator().manual_seed(0)
    more = {"num_inference_steps": steps, "generator": generator, "output_type": "latent"}
    return pipe(**call | more | changed)[0]
