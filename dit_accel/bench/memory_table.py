"""Memory that well-known models need under region-adaptive sampling, from `estimate_memory` on models without weights."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from tqdm import tqdm

from dit_accel.memory import estimate_memory

GIB = 2**30
GPUS = (16, 24, 32, 40, 48, 80, 96, 141, 192)
"""Memory of common GPUs, in GB."""


@dataclass(frozen=True)
class Known:
    """A published model at a common size."""

    name: str
    build: Callable[[], Any]
    """Builds the transformer from its published config, on the default device."""
    height: int
    width: int
    num_frames: int = 1
    guidance: bool = True
    """Whether each step is computed with and without the prompt."""
    spatial: int = 8
    """Pixels per latent along one side."""
    temporal: int = 4
    """Frames per latent frame."""
    text: int = 256
    """Text tokens that `estimate_memory` is given."""


def _wan(layers: int, heads: int, ffn: int, **others: Any) -> Callable[[], Any]:
    def build() -> Any:
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel(
            num_layers=layers,
            num_attention_heads=heads,
            attention_head_dim=128,
            ffn_dim=ffn,
            **others,
        )

    return build


def _sd3(layers: int, heads: int, **others: Any) -> Callable[[], Any]:
    def build() -> Any:
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel(
            sample_size=128,
            num_layers=layers,
            attention_head_dim=64,
            num_attention_heads=heads,
            joint_attention_dim=4096,
            caption_projection_dim=64 * heads,
            pooled_projection_dim=2048,
            pos_embed_max_size=192,
            **others,
        )

    return build


def _class(name: str, **config: Any) -> Callable[[], Any]:
    def build() -> Any:
        import diffusers

        return getattr(diffusers, name)(**config)

    return build


MODELS = (
    Known("Stable Diffusion 3 medium", _sd3(24, 24), 1024, 1024),
    Known("Stable Diffusion 3.5 large", _sd3(38, 38, qk_norm="rms_norm"), 1024, 1024),
    Known("Lumina-Image 2.0", _class("Lumina2Transformer2DModel", cap_feat_dim=2304), 1024, 1024),
    Known(
        "FLUX.1-dev",
        _class("FluxTransformer2DModel", guidance_embeds=True),
        1024,
        1024,
        guidance=False,
    ),
    Known("Qwen-Image", _class("QwenImageTransformer2DModel"), 1328, 1328),
    Known("Wan2.1-T2V-1.3B", _wan(30, 12, 8960), 480, 832, 81),
    Known("Wan2.1-T2V-14B", _wan(40, 40, 13824), 480, 832, 81),
    Known("Wan2.1-T2V-14B", _wan(40, 40, 13824), 720, 1280, 81),
    Known(
        "Wan2.2-TI2V-5B",
        _wan(30, 24, 14336, in_channels=48, out_channels=48),
        704,
        1280,
        121,
        spatial=16,
    ),
    Known(
        "HunyuanVideo",
        _class("HunyuanVideoTransformer3DModel", guidance_embeds=True),
        720,
        1280,
        129,
        guidance=False,
    ),
    Known(
        "LTX-Video 2B", _class("LTXVideoTransformer3DModel"), 512, 768, 121, spatial=32, temporal=8
    ),
    Known(
        "CogVideoX-5B",
        _class(
            "CogVideoXTransformer3DModel",
            num_attention_heads=48,
            num_layers=42,
            use_rotary_positional_embeddings=True,
        ),
        480,
        720,
        49,
    ),
)


def estimates(model: Known, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Return bytes of the weights of the transformer, of a call, and of what each kind of steps keeps.

    Args:
        model: the model and the size of its samples. Batch 1.
        dtype: dtype of weights and activations.
    """
    with torch.device("meta"):
        transformer = model.build().to(dtype)
    pipe = SimpleNamespace(
        transformer=transformer,
        transformer_2=None,
        scheduler=None,
        vae_scale_factor=model.spatial,
        vae_scale_factor_spatial=model.spatial,
        vae_scale_factor_temporal=model.temporal,
        vae_spatial_compression_ratio=model.spatial,
        vae_temporal_compression_ratio=model.temporal,
        _execution_device="cpu",
    )

    def estimate(**ras: Any) -> Any:
        return estimate_memory(
            pipe,
            height=model.height,
            width=model.width,
            num_frames=model.num_frames,
            guidance=model.guidance,
            max_sequence_length=model.text,
            ras=ras,
        )

    forecast = estimate(budget=0.65)
    partial = {
        "partial_hold": estimate(ratio=0.5, kv_predictor="hold"),
        "partial_linear": estimate(ratio=0.5, kv_predictor="linear"),
        "partial_fp8": estimate(ratio=0.5, kv_predictor="hold", kv_cache="fp8"),
    }
    return {
        "model": model.name,
        "size": [model.height, model.width, model.num_frames],
        "weights_bytes": sum(x.numel() * x.element_size() for x in transformer.parameters()),
        "working_bytes": forecast.working_bytes,
        "forecast_bytes": forecast.total_bytes,
        **{f"{name}_bytes": x.total_bytes for name, x in partial.items()},
    }


def rows(models: tuple[Known, ...] = MODELS) -> list[dict[str, Any]]:
    """Return `estimates` of each model."""
    return [estimates(x) for x in tqdm(models, desc="models", disable=None)]


def smallest_gpu(needed: float) -> str:
    """Return the smallest common GPU with so many bytes, such as "24 GB"."""
    return next((f"{x} GB" for x in GPUS if needed <= x * 1e9 * 0.95), "none")


def table(measured: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table: GiB, and the smallest GPU for each kind of steps."""
    kinds = ("partial_hold", "partial_linear", "partial_fp8")
    lines = [
        "| model, height x width x frames | base; GPU without RAS or with forecast steps | partial, held | "
        "partial, extrapolated | partial, held in fp8 |",
        "|---|---|---|---|---|",
    ]
    for row in measured:
        base = row["weights_bytes"] + row["working_bytes"]
        size = " x ".join(str(x) for x in row["size"] if x != 1)
        cells = [f"{row['model']}, {size}"]
        cells += [f"{base / GIB:.1f}; {smallest_gpu(base + row['forecast_bytes'])}"]
        for kind in kinds:
            kept = row[f"{kind}_bytes"]
            cells.append(f"{kept / GIB:.1f}; {smallest_gpu(base + kept)}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
