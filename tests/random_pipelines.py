"""Tiny pipelines of every family with random weights, called with random embeddings: no text encoder.

Each family in `MORE` has a file in `random_families/`, with these functions and constants:

- `make(solver)`: the pipeline, with `liven`ed weights and a scheduler of `scheduler(solver)`;
- `embeddings(prompts)`: keywords with random embeddings of numbered prompts (negative numbers: negative prompts), without
  the prefix "negative_";
- `arguments(prompts, guidance)`: all other keywords of a call: the default size, guidance, negative embeddings;
- `GRID`: number of image tokens along (t, h, w) at the default size; `SIZES`: keywords of two other sizes, odd and not square;
- `blocks(transformer)`: the blocks that are compiled one by one; `CONTEXTS`: number of calls in a step with guidance 2;
- `CHANNEL_AXIS = 2`, if outputs have frames before channels;
- `RUNS = 2`, if there are two transformers: every run has twice as many steps.
"""

import importlib
import pkgutil

import torch

from dit_accel.runtime.components import transformers_of
from dit_accel.runtime.install import method_of

from . import random_families

SCHEDULERS = ("euler", "unipc", "dpm++", "heun")
FAMILIES = ("wan", "sd3", "sd35", "lumina", "lumina2")
MORE = tuple(x.name for x in pkgutil.iter_modules(random_families.__path__))


def more(family):
    """Return the module of a family in `MORE`."""
    return importlib.import_module(f"{random_families.__name__}.{family}")


def scheduler(name):
    from diffusers import (
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        FlowMatchHeunDiscreteScheduler,
        UniPCMultistepScheduler,
    )

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return {
        "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
        "heun": lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
        "unipc": lambda: UniPCMultistepScheduler(**flow),
        "dpm++": lambda: DPMSolverMultistepScheduler(**flow),
    }[name]()


def liven(transformer):
    """Replace zero weights (gates and output layers) by random ones, so that outputs depend on all layers."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.abs().max() == 0:
                parameter.normal_(std=0.1, generator=generator)
    return transformer.eval()


def image_vae(channels):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        shift_factor=0.0,
        scaling_factor=1.0,
        sample_size=64,
    ).eval()


def sd3(solver="euler", dual=()):
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=32,
        qk_norm="rms_norm" if dual else None,
        dual_attention_layers=dual,
    )
    parts = dict.fromkeys(
        (
            "text_encoder",
            "text_encoder_2",
            "text_encoder_3",
            "tokenizer",
            "tokenizer_2",
            "tokenizer_3",
        )
    )
    return StableDiffusion3Pipeline(
        transformer=liven(transformer), scheduler=scheduler(solver), vae=image_vae(16), **parts
    )


def lumina(solver="euler", heads=2, kv_heads=1):
    from diffusers import LuminaNextDiT2DModel, LuminaPipeline

    torch.manual_seed(0)
    transformer = LuminaNextDiT2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=3,
        num_attention_heads=heads,
        num_kv_heads=kv_heads,
        multiple_of=16,
        cross_attention_dim=24,
    )
    torch.nn.init.zeros_(transformer.pad_token)
    return LuminaPipeline(
        transformer=liven(transformer),
        scheduler=scheduler(solver),
        vae=image_vae(4),
        text_encoder=None,
        tokenizer=None,
    )


def lumina2(solver="euler"):
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(64, 64, 64),
        cap_feat_dim=24,
    )
    return Lumina2Pipeline(
        transformer=liven(transformer),
        scheduler=scheduler(solver),
        vae=image_vae(4),
        text_encoder=None,
        tokenizer=None,
    )


def video_vae(channels=4, cls=None, **changed):
    """Return a VAE in the layout of Wan2.1; `cls` may be another class of diffusers with the same arguments."""
    from diffusers import AutoencoderKLWan

    config = {
        "base_dim": 4,
        "z_dim": channels,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
        "latents_mean": [0.0] * channels,
        "latents_std": [1.0] * channels,
    }
    torch.manual_seed(0)
    return (cls or AutoencoderKLWan)(**config | changed).eval()


def wan_transformer(cls=None, **changed):
    """Return a transformer of Wan; `cls` may be another class of diffusers, such as that of VACE."""
    from diffusers import WanTransformer3DModel

    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 24,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 3,
        "rope_max_seq_len": 32,
    }
    torch.manual_seed(0)
    return liven((cls or WanTransformer3DModel)(**config | changed))


def wan(solver="unipc", heads=2):
    from diffusers import WanPipeline

    return WanPipeline(
        transformer=wan_transformer(num_attention_heads=heads),
        scheduler=scheduler(solver),
        vae=video_vae(),
        text_encoder=None,
        tokenizer=None,
    )


def grid_of(family):
    """Return the number of image tokens along (t, h, w) in a call of `run` at the default size."""
    if family in MORE:
        return more(family).GRID
    return (3, 7, 9) if family == "wan" else (1, 11, 13)


def make(family, solver="euler"):
    if family in MORE:
        pipe = more(family).make(solver)
    else:
        pipe = sd3(solver, dual=(0, 1)) if family == "sd35" else globals()[family](solver)
    pipe.set_progress_bar_config(disable=True)
    return pipe


BLOCKS = {
    "wan": lambda t: t.blocks,
    "sd3": lambda t: t.transformer_blocks,
    "sd35": lambda t: t.transformer_blocks,
    "lumina": lambda t: t.layers,
    "lumina2": lambda t: [*t.noise_refiner, *t.layers],
}


def compile_blocks(pipe, family, backend="aot_eager", **options):
    """Compile the repeated blocks. Return the counter of graphs."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend(backend)
    options = {"backend": counter, "fullgraph": True, **options}
    if family == "wan":
        pipe.transformer.compile_repeated_blocks(**options)
    else:  # diffusers names no repeated blocks for the others
        blocks = more(family).blocks if family in MORE else BLOCKS[family]
        for transformer in transformers_of(pipe):
            for block in blocks(transformer):
                block.compile(**options)
    return counter


def embeddings(family, prompts):
    """Return random embeddings of numbered prompts. In the Lumina models, prompt i has 5 + i tokens without padding."""
    rows, masks = [], []
    for i in prompts:
        generator = torch.Generator().manual_seed(100 + i)
        rows.append(torch.randn(12, 24, generator=generator))
        masks.append((torch.arange(12) < 5 + abs(i)).long())
    rows, masks = torch.stack(rows), torch.stack(masks)
    if family in ("sd3", "sd35"):
        pooled = rows.flatten(1)[:, :16].clone()
        return {"prompt_embeds": rows, "pooled_prompt_embeds": pooled}
    if family == "wan":
        return {"prompt_embeds": rows}
    return {"prompt_embeds": rows, "prompt_attention_mask": masks}


def run(pipe, family, prompts=(0,), *, height=None, width=None, steps=10, guidance=2.0, **changed):
    """Call the pipeline and return latents. Default sizes are 11 x 13 tokens for images and 3 x 7 x 9 for videos."""
    prompts = list(prompts)
    if family in MORE:
        own = more(family)
        call = {**own.embeddings(prompts), **own.arguments(prompts, guidance)}
        steps *= getattr(own, "RUNS", 1)
        changed = {k: x for k, x in (("height", height), ("width", width)) if x} | changed
    else:
        call = embeddings(family, prompts)
        negative = embeddings(family, [-3] * len(prompts))
        call |= {f"negative_{name}": value for name, value in negative.items()}
        call["guidance_scale"] = guidance
    for name, x in call.items():
        if not isinstance(x, torch.Tensor):
            continue
        dtype = transformers_of(pipe)[0].dtype if x.is_floating_point() else x.dtype
        call[name] = x.to(pipe._execution_device, dtype)
    generators = [torch.Generator().manual_seed(i) for i in prompts]
    if family == "wan":
        call |= {"height": height or 112, "width": width or 144, "num_frames": 9}
    elif family not in MORE:
        call |= {"height": height or 176, "width": width or 208}
    out = pipe(
        **call
        | {"num_inference_steps": steps, "generator": generators}
        | {"output_type": "latent"}
        | changed
    )
    return out.images if hasattr(out, "images") else out.frames


def randomise(pipe):
    """Set random weights of sparse attention, in place of trained ones."""

    generator = torch.Generator().manual_seed(8)
    for transformer in transformers_of(pipe):
        for module in method_of(transformer, "sla").attention.values():
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.normal_(std=0.2, generator=generator)
            module.calibrated = True


def state_of(module):
    """Return the attributes of every submodule, which `disable` has to restore."""
    return {
        name: {key: dict(x) if isinstance(x, dict) else x for key, x in vars(m).items()}
        for name, m in module.named_modules()
    }


def relative(a, b):
    return float((a - b).double().norm() / b.double().norm())
