"""`estimate_memory`: the memory that a fine-tuning run needs on each device, before anything is loaded."""

import copy
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from dit_accel.finetune.activations import measure_activations
from dit_accel.finetune.config import FinetuneConfig
from dit_accel.finetune.families.base import Trainable
from dit_accel.finetune.parameters import Trained
from dit_accel.finetune.teacher import cast_weights
from dit_accel.runtime.install import method_of
from dit_accel.sampling.devices import DTYPES

STATE_BYTES = {"adamw": 8, "prodigy": 16}
"""Bytes of optimiser state for each value that trains, fp32."""
STATE_BYTES_8BIT = 2
HALF = 2
"""Bytes of a value in bf16 or fp16."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device. The sum is what a step needs at most; caches of the allocator are not part of it."""

    weights: int
    """Weights and buffers of the transformer; with mixed precision also their copies in half precision."""
    gradients: int
    optimizer: int
    ema: int
    teacher: int
    """Frozen copy of the transformer; 0 where the teacher is the student's own transformer."""
    activations: int
    """Kept for the backward pass of one micro-batch."""
    encoders: int
    """Text encoders and VAE, which data and validation need."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, int]:
        """Return the parts and their sum, in bytes."""
        return {**asdict(self), "total": self.total}


def estimate_memory(
    trainable: Trainable,
    trained: Trained,
    config: FinetuneConfig,
    *,
    size: tuple[int, int, int],
    encoders: int = 0,
    processes: int = 1,
) -> MemoryEstimate:
    """Return the memory of one device.

    Args:
        trainable: its transformer is on the device "meta", and prepared for training.
        trained: result of `parameters.prepare`.
        config: options.
        size: (frames, height, width) of the largest samples, in pixels.
        encoders: bytes of text encoders and VAE.
        processes: devices that share the weights with `config.fsdp`.
    """
    model = trainable.transformer
    sparse = method_of(model, "sla")
    train_values = sum(x.numel() for x in trained.named.values())
    values = sum(x.numel() for x in model.parameters())
    shares = processes if config.fsdp else 1
    whole = config.train == "all"
    mixed = config.mixed_precision != "no"
    state = STATE_BYTES_8BIT if config.use_8bit_adam else STATE_BYTES[config.optimizer]
    weights = _bytes(model) // shares
    if whole and mixed:
        # Autocast keeps the copies until the backward pass; FSDP gathers those of one block at a time.
        weights += HALF * (_largest_block(trainable) if config.fsdp else values)
    teacher = 0
    if whole and config.loss != "diffusion":
        own = {id(x) for layer in sparse.layers.values() for x in layer.module.parameters()}
        copied = sum(x.numel() for x in model.parameters() if id(x) not in own)
        teacher = copied * (HALF if mixed else 4)
    return MemoryEstimate(
        weights=weights,
        gradients=4 * train_values // shares,
        optimizer=state * train_values // shares,
        ema=4 * train_values // shares if config.use_ema else 0,
        teacher=teacher // shares,
        activations=_activations(trainable, config, size),
        encoders=encoders,
    )


def _activations(trainable: Trainable, config: FinetuneConfig, size: tuple[int, int, int]) -> int:
    frames, height, width = size
    if config.train == "all" and config.mixed_precision != "no":
        # Weights are fp32 here; what autocast computes is close to what half weights compute.
        trainable = copy.copy(trainable)
        trainable.transformer = copy.deepcopy(trainable.transformer)
        cast_weights(trainable.transformer, DTYPES[config.mixed_precision])
    found = measure_activations(
        trainable,
        latents=trainable.latent_shape(height, width, frames),
        batch_size=config.train_batch_size,
    )
    return found.checkpointed if config.gradient_checkpointing else found.all


def _bytes(model: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))


def _largest_block(trainable: Trainable) -> int:
    lists = [trainable.transformer.get_submodule(name) for name in trainable.blocks]
    blocks: list[Any] = [block for x in lists for block in x.children()]
    return max(sum(x.numel() for x in block.parameters()) for block in blocks)
