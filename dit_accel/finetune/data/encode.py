"""Encoding of clips and captions by the VAE and text encoders of a model."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from dit_accel.finetune.data.buckets import SizeRules, to_pixels
from dit_accel.finetune.data.samples import Sample


@runtime_checkable
class Encoder(Protocol):
    """What data asks of `dit_accel.finetune.families.Trainable`."""

    pipe: Any

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels are multiples of it."""

    @property
    def frames_rule(self) -> tuple[int, int]:
        """(a, b): clips have a k + b frames. Images: (0, 1)."""

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        """Return the shape of the latents of one sample."""

    def encode_prompts(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """Return conditions, one row for each prompt."""

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return the latents of pixels `[B, 3, F, H, W]` in [-1, 1]."""


def size_rules(trainable: Encoder) -> SizeRules:
    """Return the sizes that a model accepts. The outline of a pipeline is enough."""
    step, _ = trainable.frames_rule
    return SizeRules(trainable.size_multiple, step)


def encode_clips(
    trainable: Encoder, clips: Sequence[UInt8[np.ndarray, "f h w 3"]], captions: Sequence[str]
) -> list[Sample]:
    """Return the latents and conditions of clips of one size, on the CPU.

    Raises:
        RuntimeError: the memory does not suffice.
    """
    try:
        latents = encode_latents(trainable, clips)
        return [(x, y) for x, y in zip(latents, encode_captions(trainable, captions), strict=True)]
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"out of memory with {len(clips)} clips of {list(clips[0].shape[:3])} (frames, height, width) at once "
            f"({str(error).splitlines()[0]}); accepted is a smaller batch_size or size"
        ) from error


def encode_latents(
    trainable: Encoder, clips: Sequence[UInt8[np.ndarray, "f h w 3"]]
) -> list[Tensor]:
    """Return the latents of clips of one size, on the CPU in fp32."""
    latents = trainable.encode_pixels(torch.stack([to_pixels(x) for x in clips]))
    return list(latents.float().cpu().unbind())


def encode_captions(trainable: Encoder, captions: Sequence[str]) -> list[dict[str, Tensor]]:
    """Return the conditions of each caption, on the CPU."""
    conditions = {k: x.cpu() for k, x in trainable.encode_prompts(captions).items()}
    return [{k: x[i] for k, x in conditions.items()} for i in range(len(captions))]
