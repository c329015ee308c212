"""`Teacher`: the frozen dense model, whose velocity is the training target of the student."""

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
    """Dense model with the weights from before training.

    Args:
        model: frozen copy of the transformer, needed if all weights train. None: use the transformer of the student
            with sparse attention paused and adapters disabled, which needs no extra memory.
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
        """Return the velocity of the dense model. See `Trainable.velocity`."""
        if self.model is not None:
            return trainable.velocity(self.model, noisy_latents, sigmas, conditions)
        with dense(trainable.transformer):
            return trainable.velocity(trainable.transformer, noisy_latents, sigmas, conditions)


def make_teacher(trainable: Trainable, config: FinetuneConfig) -> Teacher:
    """Create the teacher. Call this function before weights are trained or loaded from a checkpoint.

    Args:
        trainable: model to copy or share. Sparse attention may be installed on its transformer.
        config: options of the run. With train="all" the transformer is copied in the dtype of the computation.
    """
    if config.train != "all":
        return Teacher()
    model = copy.deepcopy(trainable.transformer)
    control.disable(model)
    if config.mixed_precision != "no":
        cast_weights(model, DTYPES[config.mixed_precision])
    return Teacher(model.requires_grad_(False).eval())


def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Cast weights in place like `from_pretrained(dtype=...)`, which keeps some modules and rotary tables in fp32."""
    kept = set(model._keep_in_fp32_modules or ())
    for name, x in model.state_dict(keep_vars=True).items():
        if x.is_floating_point() and kept.isdisjoint(name.split(".")):
            x.data = x.data.to(dtype)


@contextlib.contextmanager
def dense(transformer: Any) -> Iterator[None]:
    """Context manager that pauses sparse attention and disables adapters.

    A transformer with frozen weights then computes the same output as before training.
    """
    sla = method_of(transformer, "sla")
    with contextlib.nullcontext() if sla is None else sla.paused(), adapters_off(transformer):
        yield


@contextlib.contextmanager
def adapters_off(transformer: Any) -> Iterator[None]:
    """Context manager that disables the adapters of a transformer."""
    if not getattr(transformer, "peft_config", None):
        yield
        return
    # PEFT changes `requires_grad` of all adapter weights when it switches adapters. Restore it afterwards.
    trains = [(x, x.requires_grad) for x in transformer.parameters()]
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()
        for parameter, flag in trains:
            parameter.requires_grad_(flag)
