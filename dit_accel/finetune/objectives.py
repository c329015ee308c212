"""`Objective`: draw noise levels and compute the training loss of the student."""

from typing import Any

import numpy as np
import torch
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from jaxtyping import Float
from torch import Tensor

from dit_accel.finetune.batch import Batch
from dit_accel.finetune.config import FinetuneConfig
from dit_accel.finetune.families.base import Trainable
from dit_accel.finetune.teacher import Teacher

LOWEST_SIGMA = 1e-3
"""Lowest noise level: the lowest level above 0 of a scheduler with 1,000 timesteps."""
DROPOUT, DIFFUSION_WEIGHT = 0.1, 0.5
"""Defaults of `caption_dropout` and `diffusion_weight`."""


class Objective:
    """Loss of one micro-batch.

    Noise, noise level and caption dropout of a row depend only on the seed, the step and the index of the row in the
    global batch. Results therefore do not change with the number of processes, gradient accumulation or resuming.

    Args:
        config: options of the run.
        trainable: model that predicts velocities.
        teacher: the dense model. May be None with loss="diffusion".
        null_conditions: conditions of the empty caption, one row (`Trainable.encode_null`).

    Raises:
        ValueError: if the loss needs a teacher and `teacher` is None.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        trainable: Trainable,
        teacher: Teacher | None,
        null_conditions: dict[str, Tensor],
    ) -> None:
        if teacher is None and config.loss != "diffusion":
            raise ValueError(f"teacher=None: loss={config.loss!r} requires a teacher")
        self.config = config
        self.trainable = trainable
        self.teacher = teacher
        self.null_conditions = null_conditions
        self.dropout = 0.0
        if config.targets == "mixed":
            self.dropout = DROPOUT if config.caption_dropout is None else config.caption_dropout
        self.shift = trainable.flow_shift if config.flow_shift is None else config.flow_shift

    def __call__(
        self, model: Any, batch: Batch, *, step: int, first: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss over all rows, and scalars for the log.

        Args:
            model: the student: the transformer, or a wrapper around it.
            batch: clean latents and conditions.
            step: index of the optimiser step.
            first: index of the first row in the global batch of the step.

        Returns:
            The loss and a dict of detached scalars: "loss", "sigma" (mean noise level), the used terms "distillation"
            and "diffusion" with the weights of the weighting scheme, and "relative_error" (squared error divided by
            the squared velocity of the teacher).
        """
        sigmas, noise, dropped = self.draw(batch.latents, step, first)
        latents = batch.latents.float()
        level = sigmas.view(-1, *[1] * (latents.ndim - 1))
        noisy = torch.lerp(latents, noise, level)
        conditions = self.without_captions(batch.conditions, dropped)
        student = self.trainable.velocity(model, noisy, sigmas, conditions)
        weight = compute_loss_weighting_for_sd3(self.config.weighting_scheme, sigmas)
        losses: dict[str, Tensor] = {}
        logged: dict[str, Tensor] = {"sigma": sigmas.mean()}
        if self.config.loss != "diffusion":
            target = self.target(noisy, sigmas, conditions)
            error = _mean_square(student - target)
            losses["distillation"] = (weight * error).mean()
            logged["relative_error"] = (error / _mean_square(target)).mean().detach()
        if self.config.loss != "distillation":
            losses["diffusion"] = (weight * _mean_square(student - (noise - latents))).mean()
        loss = self._mix(losses)
        parts = {name: x.detach() for name, x in losses.items()}
        return loss, {"loss": loss.detach(), **parts, **logged}

    def _mix(self, losses: dict[str, Tensor]) -> Tensor:
        if len(losses) == 1:
            return next(iter(losses.values()))
        share = self.config.diffusion_weight
        share = DIFFUSION_WEIGHT if share is None else share
        return (1 - share) * losses["distillation"] + share * losses["diffusion"]

    def draw(
        self, latents: Float[Tensor, "b c *thw"], step: int, first: int
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, "b c *thw"], Tensor]:
        """Return noise levels `[B]`, noise, and a bool mask `[B]` of the captions to drop."""
        sigmas, noise, dropped = [], [], []
        for row in range(len(latents)):
            generator = row_generator(self.config.seed, step, first + row)
            sigmas.append(self._sigma(generator))
            dropped.append(torch.rand((), generator=generator) < self.dropout)
            # Draw on the CPU in fp32, so that the noise is equal on all devices.
            noise.append(torch.randn(latents.shape[1:], generator=generator))
        device = latents.device
        return (
            torch.cat(sigmas).to(device),
            torch.stack(noise).to(device),
            torch.stack(dropped).to(device),
        )

    def _sigma(self, generator: torch.Generator) -> Tensor:
        """Return one noise level, `[1]`."""
        config = self.config
        level = compute_density_for_timestep_sampling(
            config.weighting_scheme,
            batch_size=1,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
            mode_scale=config.mode_scale,
            generator=generator,
        )
        shifted = self.shift * level / (1 + (self.shift - 1) * level)
        return shifted.clamp(LOWEST_SIGMA, 1)

    def without_captions(self, conditions: dict[str, Tensor], dropped: Tensor) -> dict[str, Tensor]:
        """Return the conditions with the empty caption in the dropped rows.

        Args:
            conditions: conditions, one row per sample.
            dropped: bool mask `[B]` of the rows to replace.

        Raises:
            ValueError: if the shapes differ from the shapes of the empty caption.
        """
        if not self.dropout:
            return conditions
        null = self._null_like(conditions)
        return {
            name: torch.where(dropped.view(-1, *[1] * (x.ndim - 1)), null[name], x)
            for name, x in conditions.items()
        }

    def _null_like(self, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the conditions of the empty caption with the device and dtype of `conditions`."""
        shapes = {name: tuple(x.shape[1:]) for name, x in conditions.items()}
        null = {name: tuple(x.shape[1:]) for name, x in self.null_conditions.items()}
        if shapes != null:
            raise ValueError(
                f"null_conditions: shapes {null}; expected the shapes of the captions, {shapes}. Encode both with the same "
                "max_sequence_length"
            )
        return {name: self.null_conditions[name].to(x) for name, x in conditions.items()}

    def target(
        self,
        noisy: Float[Tensor, "b c *thw"],
        sigmas: Float[Tensor, " b"],
        conditions: dict[str, Tensor],
    ) -> Float[Tensor, "b c *thw"]:
        """Return the velocity of the teacher. With targets="guided" it is the guided velocity."""
        assert self.teacher is not None
        velocity = self.teacher.velocity(self.trainable, noisy, sigmas, conditions)
        if self.config.targets != "guided":
            return velocity
        assert self.config.guidance_scale is not None
        rows = {
            name: x.expand(len(noisy), *x.shape[1:])
            for name, x in self._null_like(conditions).items()
        }
        unconditional = self.teacher.velocity(self.trainable, noisy, sigmas, rows)
        return self.trainable.guide(velocity, unconditional, self.config.guidance_scale)


def row_generator(seed: int, step: int, row: int) -> torch.Generator:
    """Return a seeded CPU generator for one row of the global batch of a step."""
    words = np.random.SeedSequence((seed, step, row)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]) & (2**63 - 1))


def _mean_square(x: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    return x.square().flatten(1).mean(1)
