"""Arguments of one pipeline call, and checks of counts, seeds and frame rates."""

import inspect
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Dtype = Literal["auto", "fp32", "bf16", "fp16"]
Kind = Literal["images", "clips"]
"""Kind of the samples of a pipeline."""
FRAMES = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
"""Attribute names of video pipelines for the number of frames per latent frame."""
SEEDS = 2**63
"""Seeds must be in [0, SEEDS), the non-negative range of `torch.Generator.manual_seed`."""
FPS = (0.01, 1000.0)
"""Smallest and largest frame rate that mp4 and GIF files support."""
LARGEST = {
    "height": 65_536,
    "width": 65_536,
    "num_frames": 65_536,
    "num_inference_steps": 10_000,
    "max_sequence_length": 8_192,
}
"""Maximum of each integer argument, so that a typing error does not exhaust the memory."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Arguments of one pipeline call. None keeps the default of the pipeline.

    Raises:
        ValueError: a value that no pipeline accepts.
    """

    height: int | None = None
    """Height in pixels. The model requires a multiple of its scale factor."""
    width: int | None = None
    """Width in pixels, likewise."""
    num_frames: int | None = None
    """Number of frames of a clip, temporal scale factor * k + 1 (4k + 1 for Wan2.1)."""
    num_inference_steps: int | None = None
    """Number of denoising steps."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance."""
    negative_prompt: str | None = None
    """Negative prompt of classifier-free guidance."""
    max_sequence_length: int | None = None
    """Maximum number of text tokens."""
    image: str | None = None
    """Input image file of an image-to-video model."""

    def __post_init__(self) -> None:
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if value is not None:
                check_count(name, value, largest=largest)
        scale = self.guidance_scale
        if scale is not None and not _is_finite(scale):
            raise ValueError(f"guidance_scale={scale!r}: must be a finite number")
        if not isinstance(self.negative_prompt, str | None):
            raise ValueError(f"negative_prompt={self.negative_prompt!r}: must be a str")

    def call_arguments(self) -> dict[str, Any]:
        """Return the arguments that are not None, under the names of the pipeline."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def filled(self, defaults: dict[str, Any]) -> "Sampling":
        """Return a copy with `defaults` in place of None."""
        return Sampling(**{**defaults, **self.call_arguments()})

    def overridden(self, **own: Any) -> "Sampling":
        """Return a copy in which `own` replaces values."""
        return Sampling(**{**asdict(self), **own})


def with_steps(pipe: Any, sampling: Sampling) -> Sampling:
    """Return `sampling` with the default number of steps of the pipeline if it has none."""
    default = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
    return sampling.filled({"num_inference_steps": default})


def check_count(name: str, value: Any, *, least: int = 1, largest: int | None = None) -> None:
    """Raise ValueError unless `value` is an int in [least, largest]."""
    if type(value) is not int or value < least or (largest is not None and value > largest):
        valid = f"an int >= {least}" if largest is None else f"an int in [{least}, {largest}]"
        raise ValueError(f"{name}={value!r}: must be {valid}")


def check_seed(seed: Any, count: int = 1) -> None:
    """Raise ValueError unless the seeds `seed` to `seed + count - 1` are valid."""
    if type(seed) is not int or not 0 <= seed < SEEDS:
        raise ValueError(f"seed={seed!r}: must be an int in [0, 2**63)")
    if seed + count > SEEDS:
        raise ValueError(
            f"seed={seed}: must be at most 2**63 - {count} with {count} samples, because later seeds count up from it"
        )


def check_fps(fps: Any) -> None:
    """Raise ValueError unless `fps` is a frame rate that mp4 and GIF files support."""
    if not (_is_finite(fps) and FPS[0] <= fps <= FPS[1]):
        raise ValueError(f"fps={fps!r}: must be a number in [{FPS[0]}, {FPS[1]:g}]")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
