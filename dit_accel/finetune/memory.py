"""`estimate_memory`: estimate the memory of a fine-tuning run on each device without loading weights."""

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
"""Bytes of fp32 optimiser state per trained value."""
STATE_BYTES_8BIT = 2
"""Bytes of 8-bit optimiser state per trained value."""
HALF = 2
"""Bytes of a value in bf16 or fp16."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device by purpose. The sum is the peak of a step without the cache of the allocator."""

    weights: int
    """Weights and buffers of the transformer; with mixed precision also their copies in half precision."""
    gradients: int
    """Gradients of the trained parameters."""
    optimizer: int
    """State of the optimiser."""
    ema: int
    """Moving average of the trained parameters; 0 without `use_ema`."""
    teacher: int
    """Frozen copy of the transformer; 0 if the teacher shares the transformer of the student."""
    activations: int
    """Activations kept for the backward pass of one micro-batch."""
    encoders: int
    """Text encoders and VAE, which encode the data and decode validation samples."""

    @property
    def total(self) -> int:
        """Sum of all fields."""
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, int]:
        """Return all fields and their sum, in bytes."""
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
    """Return the estimated memory of one device.

    Args:
        trainable: model whose transformer is on the meta device and prepared for training.
        trained: result of `parameters.prepare`.
        config: options of the run.
        size: (frames, height, width) of the largest samples in pixels.
        encoders: bytes of text encoders and VAE.
        processes: number of devices that share the weights with `config.fsdp`.
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
        # Autocast keeps half-precision copies until the backward pass. FSDP gathers one block at a time.
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
        # Autocast is approximated by a copy of the model with half-precision weights.
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
