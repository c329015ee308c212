"""`Sampling`: the arguments of one pipeline call, and checks of the numbers that a run starts from."""

import inspect
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Dtype = Literal["auto", "fp32", "bf16", "fp16"]
Kind = Literal["images", "clips"]
"""What a pipeline makes."""
FRAMES = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
"""Names that pipelines of clips have for the frames of a latent frame."""
SEEDS = 2**63
"""Seeds are in [0, SEEDS): what `torch.Generator.manual_seed` takes without a sign."""
FPS = (0.01, 1000.0)
"""Frame rates that both mp4 and GIF can hold."""
LARGEST = {
    "height": 65_536,
    "width": 65_536,
    "num_frames": 65_536,
    "num_inference_steps": 10_000,
    "max_sequence_length": 8_192,
}
"""Largest accepted value of each whole number. A larger one is a slip that would exhaust the memory."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Arguments of one pipeline call; None leaves the pipeline's own default.

    Raises:
        ValueError: a value that no pipeline accepts.
    """

    height: int | None = None
    """Pixels; must be divisible by the model's step."""
    width: int | None = None
    num_frames: int | None = None
    """Temporal factor * k + 1 (4k+1 for Wan2.1)."""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    max_sequence_length: int | None = None
    """Text tokens."""
    image: str | None = None
    """Picture file that a clip begins with, for image-to-video models."""

    def __post_init__(self) -> None:
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if value is not None:
                check_count(name, value, largest=largest)
        scale = self.guidance_scale
        if scale is not None and not _is_finite(scale):
            raise ValueError(f"guidance_scale={scale!r}: must be a finite number")
        if not isinstance(self.negative_prompt, str | None):
            raise ValueError(f"negative_prompt={self.negative_prompt!r}: must be text")

    def call_arguments(self) -> dict[str, Any]:
        """Return the given arguments under the pipeline's names."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def filled(self, defaults: dict[str, Any]) -> "Sampling":
        """Return a copy with `defaults` where no value was given."""
        return Sampling(**{**defaults, **self.call_arguments()})

    def overridden(self, **own: Any) -> "Sampling":
        """Return a copy with `own` in place of the values here."""
        return Sampling(**{**asdict(self), **own})


def with_steps(pipe: Any, sampling: Sampling) -> Sampling:
    """Return `sampling` with the pipeline's default number of steps where none is given."""
    default = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
    return sampling.filled({"num_inference_steps": default})


def check_count(name: str, value: Any, *, least: int = 1, largest: int | None = None) -> None:
    """Raise ValueError unless `value` is an int in [least, largest]."""
    if type(value) is not int or value < least or (largest is not None and value > largest):
        valid = f"an int >= {least}" if largest is None else f"an int in [{least}, {largest}]"
        raise ValueError(f"{name}={value!r}: accepted is {valid}")


def check_seed(seed: Any, count: int = 1) -> None:
    """Raise ValueError unless `seed` to `seed + count - 1` are seeds."""
    if type(seed) is not int or not 0 <= seed < SEEDS:
        raise ValueError(f"seed={seed!r}: accepted is an int >= 0 and below 2**63")
    if seed + count > SEEDS:
        raise ValueError(
            f"seed={seed}: with {count} samples the last seed would be above 2**63 - 1; accepted is a smaller "
            "seed"
        )


def check_fps(fps: Any) -> None:
    """Raise ValueError unless `fps` is a frame rate that files can hold."""
    if not (_is_finite(fps) and FPS[0] <= fps <= FPS[1]):
        raise ValueError(f"fps={fps!r}: accepted is a number in [{FPS[0]}, {FPS[1]:g}]")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
