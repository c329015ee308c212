"""`Parts`: components of a training run that its steps use."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dit_accel.finetune.engine import Engine
from dit_accel.finetune.feed import Feed
from dit_accel.finetune.log import RunLog
from dit_accel.finetune.progress import StepMeter
from dit_accel.finetune.state import TrainingState
from dit_accel.finetune.stop import StopRequest


@dataclass
class Parts:
    """Components of a training run. All of them are created before the first step."""

    config: Any
    """Settings of the run (`FinetuneConfig`)."""
    folder: Path
    """Output folder of the run."""
    engine: Engine
    model: nn.Module
    """The wrapped transformer, which the loss calls."""
    objective: Any
    """Loss of the run (`Objective`)."""
    feed: Feed
    state: TrainingState
    log: RunLog
    stop: StopRequest
    meter: StepMeter
    sla: Any
    """Installed sparse attention."""
    topk_at: Callable[[int], float | None]
    """Function that returns topk for a step, or None without annealing."""
    saved_config: dict[str, Any]
    """Settings that checkpoints store, as plain values."""
    samples_sha256: str
    """Hash of the names of the training samples. A resumed run compares it with its own samples."""
    steps: int
    """Number of steps of the stage."""
    validate: Callable[[int], bool] | None = None
    """Function that validates after a number of steps if a validation is due. Returns False if a signal interrupted it."""
