"""`Teacher`: the dense model as it was before training, whose velocity the student learns."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dit_accel import control
from dit_accel.finetune.config import FinetuneConfig
from dit_accel.finetune.families.base import Trainable
from dit_accel.runtime.install import method_of
from dit_accel.sampling.devices import DTYPES


class Teacher:
    """The dense model before training.

    Attributes:
        model: frozen copy of the transformer where its weights train. None: the student's own transformer with
            sparse attention paused and adapters off, which costs no memory.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model

    @torch.no_grad()
    def velocity(
        self,
        trainable: Trainable,
        noisy_latents: Float[Tensor, "b c *thw"],
        sigmas: Float[Tensor, " b"],
        conditions: Mapping[str, Tensor],
    ) -> Float[Tensor, "b c *thw"]:
        """Return the velocity of dense attention; see `Trainable.velocity`."""
        if self.model is not None:
            return trainable.velocity(self.model, noisy_latents, sigmas, conditions)
        with dense(trainable.transformer):
            return trainable.velocity(trainable.transformer, noisy_latents, sigmas, conditions)


def make_teacher(trainable: Trainable, config: FinetuneConfig) -> Teacher:
    """Make the teacher. Call it before any weight is trained or loaded from a checkpoint.

    Args:
        trainable: its transformer may have sparse attention already, or not.
        config: with train="all" the transformer is copied, in the dtype of the computation.
    """
    if config.train != "all":
        return Teacher()
    model = copy.deepcopy(trainable.transformer)
    control.disable(model)
    if config.mixed_precision != "no":
        cast_weights(model, DTYPES[config.mixed_precision])
    return Teacher(model.requires_grad_(False).eval())


def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Cast weights in place as `from_pretrained(dtype=...)` does: some modules and rotary tables stay in fp32."""
    kept = set(model._keep_in_fp32_modules or ())
    for name, x in model.state_dict(keep_vars=True).items():
        if x.is_floating_point() and kept.isdisjoint(name.split(".")):
            x.data = x.data.to(dtype)


@contextlib.contextmanager
def dense(transformer: Any) -> Iterator[None]:
    """Context manager in which a transformer with frozen weights computes what it did before training.

    Sparse attention is paused and adapters are off.
    """
    sla = method_of(transformer, "sla")
    with contextlib.nullcontext() if sla is None else sla.paused(), adapters_off(transformer):
        yield


@contextlib.contextmanager
def adapters_off(transformer: Any) -> Iterator[None]:
    """Context manager in which adapters compute nothing."""
    if not getattr(transformer, "peft_config", None):
        yield
        return
    # PEFT changes `requires_grad` when it switches adapters, also of those that we froze.
    trains = [(x, x.requires_grad) for x in transformer.parameters()]
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()
        for parameter, flag in trains:
            parameter.requires_grad_(flag)
