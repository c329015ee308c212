"""Set up the optimiser, learning-rate schedule and moving average of the trained parameters."""

from typing import Any

import torch
from torch import nn

from dit_accel.finetune.engine import Engine
from dit_accel.finetune.optimizers import make_optimizer
from dit_accel.finetune.state import TrainingState


def wrap_student(
    engine: Engine, config: Any, transformer: nn.Module, trained: Any, blocks: tuple[str, ...]
) -> tuple[nn.Module, TrainingState]:
    """Wrap the transformer for distributed training, and create its training state.

    Args:
        engine: engine of the run.
        config: settings of the run (`FinetuneConfig`).
        transformer: the student.
        trained: result of `prepare` (`Trained`).
        blocks: names of the transformer's lists of blocks.

    Returns:
        The wrapped transformer, which the loss calls, and the training state.
    """
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    names = {id(x): name for name, x in trained.named.items()}
    model = engine.wrap(transformer, blocks)
    now = dict(transformer.named_parameters())  # read after wrapping: sharding replaces parameters
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
    """Mark all layers as calibrated, so that their first call does not overwrite loaded weights."""
    for layer in sla.layers.values():
        layer.module.calibrated = True


@torch.no_grad()
def calibrate(sla: Any, objective: Any, transformer: nn.Module, batch: Any) -> None:
    """Calibrate the layers whose weights are initialised from the data of their first call.

    All processes calibrate on the same sample. Otherwise each process would use its own samples, and the weights
    of the processes would differ.

    Args:
        sla: installed sparse attention.
        objective: loss of the run (`Objective`).
        transformer: the student, before it is wrapped.
        batch: first row of the first step, identical in all processes.
    """
    if not all(x.module.calibrated for x in sla.layers.values() if x.scheduled):
        objective(transformer, batch, step=0, first=0)
