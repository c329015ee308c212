"""`Trainable`: common interface of all model families for fine-tuning: encoding, sizes and velocity."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from dit_accel.models import family_of
from dit_accel.runtime.target import transformer_of

Conditions = dict[str, Tensor]
"""Keyword arguments of the transformer except latents and noise level. Each tensor has one row per sample."""


class Trainable:
    """Interface between fine-tuning and a pipeline. Subclasses implement it for one model family.

    Noisy latents are `(1 - sigma) * latents + sigma * noise`, with sigma in (0, 1]. The velocity is the prediction of
    `noise - latents`. Subclasses convert models that use another direction of time or another sign.

    Args:
        pipe: the pipeline. Its outline is sufficient if nothing is encoded.
        transformer: transformer to train. Default: the transformer of the pipeline.
        max_sequence_length: number of text tokens of a prompt. Default: the default of the pipeline call.
    """

    name: ClassVar[str]
    """Name of the family in configs."""
    frames_rule: tuple[int, int] = (0, 1)
    """Pair (a, b): clips have a k + b frames. (0, 1) for images."""
    default_text_tokens: ClassVar[int]
    """Default number of text tokens of a prompt in the pipeline call."""
    adapted: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    """Names of the modules that get adapters by default."""
    blocks: ClassVar[tuple[str, ...]]
    """Names of the lists of transformer blocks. Each block is sharded on its own."""
    checkpointed: ClassVar[tuple[str, ...]]
    """Lists of `blocks` that use gradient checkpointing. Empty if diffusers does not support it for this model."""

    def __init__(
        self, pipe: Any, *, transformer: Any = None, max_sequence_length: int | None = None
    ) -> None:
        self.pipe = pipe
        self.transformer = pipe.transformer if transformer is None else transformer
        self.text_tokens = self.default_text_tokens
        if max_sequence_length is not None:
            self.text_tokens = max_sequence_length

    @classmethod
    def check(cls, transformer: Any) -> None:
        """Check that a transformer of the family can be fine-tuned.

        Raises:
            ValueError: if the transformer needs other conditions than text.
        """

    @classmethod
    def without_gradient(cls, transformer: Any) -> Collection[str]:
        """Return prefixes of the names of parameters that receive no gradient."""
        return ()

    # Sizes ------------------------------------------------------------------------------------------

    @property
    def size_multiple(self) -> int:
        """Number of pixels of which height and width must be multiples."""
        return self.pipe.vae_scale_factor * self.transformer.config.patch_size

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        """Return the shape of the latents of one sample, `[C, (F,) H, W]`.

        Args:
            height: height in pixels.
            width: width in pixels.
            num_frames: number of frames of a clip, 1 for an image.
        """
        family = family_of(self.transformer)
        return family.latent_shape(self.pipe, height, width, num_frames)[1:]

    @property
    def flow_shift(self) -> float:
        """Shift of the noise levels in the scheduler of the model. If it depends on the sample size: the shift in the
        middle of the range."""
        config = self.pipe.scheduler.config
        if config.get("use_dynamic_shifting"):
            return math.exp((config["base_shift"] + config["max_shift"]) / 2)
        shift = config.get("flow_shift")
        return float(config.get("shift", 1.0) if shift is None else shift)

    # Encoding ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditions:
        """Return the conditions of prompts, encoded as in the pipeline without guidance. All rows have equal length.

        Raises:
            ValueError: if the pipeline has no text encoder.
        """
        self._need("text_encoder")
        with self._own_dtypes():
            return self._encode_prompts(list(prompts))

    @torch.no_grad()
    def encode_null(self) -> Conditions:
        """Return the unconditional conditions of guidance without a negative prompt, one row."""
        self._need("text_encoder")
        with self._own_dtypes():
            return self._encode_null()

    @torch.no_grad()
    def encode_pixels(self, pixels: Float[Tensor, "b 3 f h w"]) -> Tensor:
        """Encode pixels into clean latents `[B, C, (F,) H, W]` in fp32, normalised as the transformer expects them.

        Args:
            pixels: pixels in [-1, 1]. Images have one frame.

        Raises:
            ValueError: if an image model gets several frames, or if the pipeline has no VAE.
        """
        self._need("vae")
        vae, scale = self.pipe.vae, self.frames_rule[0]
        if scale == 0 and pixels.shape[2] != 1:
            raise ValueError(
                f"pixels: {pixels.shape[2]} frames; expected 1, because this model makes images"
            )
        pixels = pixels.to(self.pipe._execution_device, vae.dtype)
        with self._own_dtypes():
            encoded = vae.encode(pixels if scale else pixels[:, :, 0]).latent_dist.mode()
        return self._normalise(encoded.float())

    def _own_dtypes(self) -> torch.autocast:
        """Context manager that disables autocast, so that text encoders and VAE compute in the dtype of their weights.

        Training may encode inside of autocast. Its samples must equal those of `dit-accel precompute`.
        """
        return torch.autocast(self.pipe._execution_device.type, enabled=False)

    def _need(self, part: str) -> None:
        if getattr(self.pipe, part, None) is None:
            raise ValueError(
                f"pipe.{part}=None: encoding requires it; load the pipeline with this component"
            )

    def _encode_prompts(self, prompts: list[str]) -> Conditions:
        raise NotImplementedError

    def _encode_null(self) -> Conditions:
        return self._encode_prompts([""])

    def _normalise(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor

    # Velocity ---------------------------------------------------------------------------------------

    def velocity(
        self,
        model: Any,
        noisy_latents: Float[Tensor, "b c *thw"],
        sigmas: Float[Tensor, " b"],
        conditions: Mapping[str, Tensor],
    ) -> Float[Tensor, "b c *thw"]:
        """Return the prediction of `noise - latents` in fp32.

        Args:
            model: the transformer, a wrapper around it, or a copy.
            noisy_latents: `(1 - sigma) * latents + sigma * noise`.
            sigmas: noise levels in (0, 1].
            conditions: result of `encode_prompts`.
        """
        dtype = transformer_of(model).dtype
        cast = {name: _cast(x, dtype) for name, x in conditions.items()}
        return self._velocity(model, noisy_latents.to(dtype), sigmas.float(), cast).float()

    def _velocity(
        self, model: Any, noisy_latents: Tensor, sigmas: Tensor, conditions: Conditions
    ) -> Tensor:
        steps = self.pipe.scheduler.config.num_train_timesteps
        return model(
            hidden_states=noisy_latents, timestep=sigmas * steps, return_dict=False, **conditions
        )[0]

    def guide(
        self,
        conditional: Float[Tensor, "b c *thw"],
        unconditional: Float[Tensor, "b c *thw"],
        scale: float,
    ) -> Float[Tensor, "b c *thw"]:
        """Return the guided velocity that the pipeline uses at this guidance scale."""
        return unconditional + scale * (conditional - unconditional)

    def example_conditions(self, batch_size: int, device: str = "meta") -> Conditions:
        """Return conditions with the correct shapes and undefined values."""
        raise NotImplementedError


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x
