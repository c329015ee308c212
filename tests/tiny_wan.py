"""A complete Wan2.1 repository with random weights, built offline from configs."""

import torch

from dit_accel.files import asset


def random_wan(image_to_video: bool = False):
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
    from transformers import AutoTokenizer, UMT5EncoderModel

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=12 if image_to_video else 4,
        out_channels=4,
        text_dim=64,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
    ).eval()
    text_encoder = UMT5EncoderModel.from_pretrained(asset("tiny-wan") / "text_encoder")
    return {
        "tokenizer": AutoTokenizer.from_pretrained(asset("tiny-wan") / "tokenizer"),
        "text_encoder": text_encoder.requires_grad_(False),
        "vae": vae,
        "transformer": transformer,
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }
