"""`Trainable`: a pipeline as fine-tuning sees it. Velocities have one sign and one scale of noise in every family."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from dit_accel.models import family_of
from dit_accel.runtime.target import transformer_of

Conditions = dict[str, Tensor]
"""Keyword arguments of the transformer beside latents and noise level, one row for each sample."""


class Trainable:
    """A pipeline as fine-tuning sees it.

    Noisy latents are `(1 - sigma) * latents + sigma * noise`, with sigma in (0, 1]. The velocity is what predicts
    `noise - latents`. Families that count time from noise to image, or predict the other sign, are turned.

    Args:
        pipe: the pipeline, or its outline where nothing is encoded.
        transformer: Default: that of the pipeline.
        max_sequence_length: text tokens of a prompt. Default: that of the pipeline's call.
    """

    name: ClassVar[str]
    """Name of the family in configs."""
    frames_rule: tuple[int, int] = (0, 1)
    """(a, b): clips have a k + b frames. Images: (0, 1)."""
    default_text_tokens: ClassVar[int]
    """Text tokens of a prompt in the pipeline's call."""
    adapted: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    """Names of the modules that get adapters by default."""
    blocks: ClassVar[tuple[str, ...]]
    """Names of the lists of transformer blocks, which are sharded one by one."""
    checkpointed: ClassVar[tuple[str, ...]]
    """Those whose blocks gradient checkpointing computes again; empty: diffusers has none for this model."""

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
        """Refuse a transformer of the family that cannot be fine-tuned.

        Raises:
            ValueError: it needs conditions beside text.
        """

    @classmethod
    def without_gradient(cls, transformer: Any) -> Collection[str]:
        """Return prefixes of the names of parameters that no loss reaches."""
        return ()

    # Sizes ------------------------------------------------------------------------------------------

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels are multiples of this."""
        return self.pipe.vae_scale_factor * self.transformer.config.patch_size

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        """Return the shape of the latents of one sample, `[C, (F,) H, W]`.

        Args:
            height, width: pixels.
            num_frames: frames of a clip, 1 for an image.
        """
        family = family_of(self.transformer)
        return family.latent_shape(self.pipe, height, width, num_frames)[1:]

    @property
    def flow_shift(self) -> float:
        """Shift of the noise levels of the model's scheduler. Where it depends on the size of the sample, that in
        the middle of its range."""
        config = self.pipe.scheduler.config
        if config.get("use_dynamic_shifting"):
            return math.exp((config["base_shift"] + config["max_shift"]) / 2)
        shift = config.get("flow_shift")
        return float(config.get("shift", 1.0) if shift is None else shift)

    # Encoding ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditions:
        """Return the conditions of prompts, as the pipeline makes them, without guidance. All rows have one length.

        Raises:
            ValueError: the pipeline was loaded without text encoder.
        """
        self._need("text_encoder")
        with self._own_dtypes():
            return self._encode_prompts(list(prompts))

    @torch.no_grad()
    def encode_null(self) -> Conditions:
        """Return the conditions that the pipeline guides away from if there is no negative prompt; one row."""
        self._need("text_encoder")
        with self._own_dtypes():
            return self._encode_null()

    @torch.no_grad()
    def encode_pixels(self, pixels: Float[Tensor, "b 3 f h w"]) -> Tensor:
        """Return clean latents, `[B, C, (F,) H, W]` in fp32, normalised as the transformer takes them.

        Args:
            pixels: in [-1, 1]; images have one frame.

        Raises:
            ValueError: several frames for a model of images, or a pipeline that was loaded without VAE.
        """
        self._need("vae")
        vae, scale = self.pipe.vae, self.frames_rule[0]
        if scale == 0 and pixels.shape[2] != 1:
            raise ValueError(
                f"pixels: {pixels.shape[2]} frames; this model makes images, accepted is 1"
            )
        pixels = pixels.to(self.pipe._execution_device, vae.dtype)
        with self._own_dtypes():
            encoded = vae.encode(pixels if scale else pixels[:, :, 0]).latent_dist.mode()
        return self._normalise(encoded.float())

    def _own_dtypes(self) -> torch.autocast:
        """Context manager in which text encoders and VAE compute in the dtype of their weights.

        Training may encode inside of autocast, `dit-accel precompute` never does; both have to give the same samples.
        """
        return torch.autocast(self.pipe._execution_device.type, enabled=False)

    def _need(self, part: str) -> None:
        if getattr(self.pipe, part, None) is None:
            raise ValueError(
                f"pipe.{part}=None: nothing can be encoded without it; load the pipeline with it"
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
        """Return the model's prediction of `noise - latents`, in fp32.

        Args:
            model: the transformer, a wrapper of it, or a copy.
            noisy_latents: `(1 - sigma) * latents + sigma * noise`.
            sigmas: noise levels in (0, 1].
            conditions: see `encode_prompts`.
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
        """Return the velocity that the pipeline samples with at this guidance scale."""
        return unconditional + scale * (conditional - unconditional)

    def example_conditions(self, batch_size: int, device: str = "meta") -> Conditions:
        """Return conditions of the right shapes without values."""
        raise NotImplementedError


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x
