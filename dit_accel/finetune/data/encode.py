"""Encode clips and captions with the VAE and text encoders of a model."""

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
    """Methods of `dit_accel.finetune.families.base.Trainable` that the data loaders use."""

    pipe: Any

    @property
    def size_multiple(self) -> int:
        """Number of pixels of which height and width must be multiples."""

    @property
    def frames_rule(self) -> tuple[int, int]:
        """Pair (a, b): clips have a k + b frames. (0, 1) for images."""

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        """Return the shape of the latents of one sample."""

    def encode_prompts(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the conditions of prompts, one row per prompt."""

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return the latents of pixels `[B, 3, F, H, W]` in [-1, 1]."""


def size_rules(trainable: Encoder) -> SizeRules:
    """Return the sizes that a model supports. An outline of the pipeline is sufficient."""
    step, _ = trainable.frames_rule
    return SizeRules(trainable.size_multiple, step)


def encode_clips(
    trainable: Encoder, clips: Sequence[UInt8[np.ndarray, "f h w 3"]], captions: Sequence[str]
) -> list[Sample]:
    """Return the latents and conditions of clips of equal size, on the CPU.

    Raises:
        RuntimeError: if the memory does not suffice.
    """
    try:
        latents = encode_latents(trainable, clips)
        return [(x, y) for x, y in zip(latents, encode_captions(trainable, captions), strict=True)]
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"out of memory with batch_size={len(clips)} clips of {list(clips[0].shape[:3])} (frames, height, width) "
            f"({str(error).splitlines()[0]}); use a smaller batch_size or smaller clips"
        ) from error


def encode_latents(
    trainable: Encoder, clips: Sequence[UInt8[np.ndarray, "f h w 3"]]
) -> list[Tensor]:
    """Return the latents of clips of equal size, on the CPU in fp32."""
    latents = trainable.encode_pixels(torch.stack([to_pixels(x) for x in clips]))
    return list(latents.float().cpu().unbind())


def encode_captions(trainable: Encoder, captions: Sequence[str]) -> list[dict[str, Tensor]]:
    """Return the conditions of each caption, on the CPU."""
    conditions = {k: x.cpu() for k, x in trainable.encode_prompts(captions).items()}
    return [{k: x[i] for k, x in conditions.items()} for i in range(len(captions))]
