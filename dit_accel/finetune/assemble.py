"""Optimiser, schedule and average over the parameters that train, whether they are sharded or not."""

from typing import Any

import torch
from torch import nn

from dit_accel.finetune.engine import Engine
from dit_accel.finetune.optimizers import make_optimizer
from dit_accel.finetune.state import TrainingState


def wrap_student(
    engine: Engine, config: Any, transformer: nn.Module, trained: Any, blocks: tuple[str, ...]
) -> tuple[nn.Module, TrainingState]:
    """Wrap the transformer for its processes, and make what trains it.

    Args:
        engine: of the run.
        config: settings of the run (`FinetuneConfig`).
        transformer: the student.
        trained: `Trained`, as `prepare` returns it.
        blocks: names of the transformer's lists of blocks.

    Returns:
        The transformer as the loss calls it, and the state of the training.
    """
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    names = {id(x): name for name, x in trained.named.items()}
    model = engine.wrap(transformer, blocks)
    now = dict(transformer.named_parameters())  # sharding replaces parameters
    groups = [
        {**group, "params": [now[names[id(x)]] for x in group["params"]]}
        for group in trained.groups
    ]
    named = {name: now[name] for name in trained.named}
    optimizer = make_optimizer(config, groups)
    scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    ema = EMAModel(named.values(), decay=config.ema_decay) if config.use_ema else None
    return model, TrainingState(named, optimizer, scheduler, ema, engine.accelerator.scaler)


def mark_calibrated(sla: Any) -> None:
    """Tell all layers that their weights are loaded, so that none of them measures its own in its first call."""
    for layer in sla.layers.values():
        layer.module.calibrated = True


@torch.no_grad()
def calibrate(sla: Any, objective: Any, transformer: nn.Module, batch: Any) -> None:
    """Let layers measure what they measure in their first call.

    Without this each process would measure it on a sample of its own, and their weights would differ.

    Args:
        sla: installed sparse attention.
        objective: `Objective`.
        transformer: the student, before it is wrapped.
        batch: the first row of the first step, the same in all processes.
    """
    if not all(x.module.calibrated for x in sla.layers.values() if x.scheduled):
        objective(transformer, batch, step=0, first=0)
