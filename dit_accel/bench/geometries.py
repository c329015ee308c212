"""Transformers with real geometries and random weights, and a sampling loop that calls them as a pipeline does."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Build = Callable[[], Any]
Inputs = Callable[[torch.device, torch.dtype], dict[str, Any]]


@dataclass(frozen=True)
class Geometry:
    """A transformer with random weights and the size of its input."""

    name: str
    build: Build
    """Function that returns the transformer, on the default device."""
    inputs: Inputs
    """Function that returns the arguments of one call, without the timestep."""
    guided: bool
    """True if conditional and unconditional halves are one batch; False if they are two calls."""


def wan(
    dim: int, layers: int, heads: int, ffn: int, grid: tuple[int, int, int], text: int
) -> tuple[Build, Inputs]:
    """Return the functions `build` and `inputs` of a Wan2.1 transformer.

    Args:
        dim: width of a token.
        layers: number of blocks.
        heads: number of attention heads.
        ffn: inner width of the feed-forward layers.
        grid: number of latent tokens of a clip: frames, rows and columns.
        text: width of a text token.
    """
    from diffusers import WanTransformer3DModel

    def build() -> Any:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=heads,
            attention_head_dim=dim // heads,
            in_channels=16,
            out_channels=16,
            text_dim=text,
            freq_dim=256,
            ffn_dim=ffn,
            num_layers=layers,
        )

    def inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        t, h, w = grid
        return {
            "hidden_states": torch.randn(1, 16, t, 2 * h, 2 * w, device=device, dtype=dtype),
            "encoder_hidden_states": torch.randn(1, 512, text, device=device, dtype=dtype),
        }

    return build, inputs


def _sd3_medium() -> tuple[Build, Inputs]:
    from diffusers import SD3Transformer2DModel

    def build() -> Any:
        return SD3Transformer2DModel(
            sample_size=128,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=192,
        )

    def inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 16, 128, 128, device=device, dtype=dtype),
            "encoder_hidden_states": torch.randn(2, 333, 4096, device=device, dtype=dtype),
            "pooled_projections": torch.randn(2, 2048, device=device, dtype=dtype),
        }

    return build, inputs


def _lumina_next() -> tuple[Build, Inputs]:
    from diffusers import LuminaNextDiT2DModel
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    def build() -> Any:
        model: Any = LuminaNextDiT2DModel(num_layers=24, num_kv_heads=8)
        torch.nn.init.zeros_(model.pad_token)
        return model

    def inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 128, 128, device=device, dtype=dtype),
            "encoder_hidden_states": torch.randn(2, 256, 2048, device=device, dtype=dtype),
            "encoder_mask": torch.ones(2, 256, device=device, dtype=torch.int64),
            "image_rotary_emb": get_2d_rotary_pos_embed_lumina(72, 384, 384),
            "cross_attention_kwargs": {},
        }

    return build, inputs


def geometries(device: str) -> list[Geometry]:
    """Return the geometries of real models for a GPU, or one small geometry for a CPU."""
    if device == "cpu":
        small = wan(1024, 6, 8, 4096, (4, 32, 32), 512)
        return [Geometry("wan-dim1024-6layers-4096tokens", *small, guided=False)]
    video = wan(1536, 30, 12, 8960, (21, 30, 52), 4096)
    return [
        Geometry("sd3-medium-1024", *_sd3_medium(), guided=True),
        Geometry("lumina-next-1024", *_lumina_next(), guided=True),
        Geometry("wan2.1-1.3b-480p-81", *video, guided=False),
    ]


def large_videos() -> list[Geometry]:
    """Return video geometries in which attention takes most of the time."""
    return [
        Geometry("wan2.1-1.3b-480p-81", *wan(1536, 30, 12, 8960, (21, 30, 52), 4096), guided=False),
        Geometry("wan2.1-14b-720p-81", *wan(5120, 40, 40, 13824, (21, 45, 80), 4096), guided=False),
    ]


class Loop:
    """Sampling loop of a transformer, a scheduler and guidance, without text encoder and VAE.

    `dit_accel.enable` accepts it like a pipeline.
    """

    def __init__(self, transformer: Any, guided: bool) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.transformer = transformer
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.do_classifier_free_guidance = guided

    @torch.no_grad()
    def run(self, inputs: dict[str, Any], steps: int) -> list[float]:
        """Sample, and return the seconds of each step."""
        latents = inputs["hidden_states"]
        device = latents.device
        self.scheduler.set_timesteps(steps, device=device)
        marks = []
        for t in self.scheduler.timesteps:
            wait(device)
            start = time.perf_counter()
            call = {**inputs, "hidden_states": latents, "timestep": t.expand(latents.shape[0])}
            velocity = self.transformer(**call, return_dict=False)[0][:, : latents.shape[1]]
            wait(device)
            marks.append(time.perf_counter() - start)
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
            latents = latents.to(inputs["hidden_states"].dtype)
        return marks


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def family_blocks(transformer: Any) -> list[Any]:
    """Return the repeated blocks of a transformer."""
    names = ("blocks", "transformer_blocks", "noise_refiner", "layers")
    return [block for name in names for block in getattr(transformer, name, [])]
