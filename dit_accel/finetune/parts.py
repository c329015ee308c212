"""`Parts`: what the steps of training work with."""

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
    """What the steps work with. Everything here is made before the first step."""

    config: Any
    """`FinetuneConfig`."""
    folder: Path
    """Output folder of the run."""
    engine: Engine
    model: nn.Module
    """The transformer as the loss calls it."""
    objective: Any
    """`Objective`."""
    feed: Feed
    state: TrainingState
    log: RunLog
    stop: StopRequest
    meter: StepMeter
    sla: Any
    """Installed sparse attention."""
    topk_at: Callable[[int], float | None]
    """topk of a step; None: as it is."""
    saved_config: dict[str, Any]
    """Settings in checkpoints, as plain values."""
    samples_sha256: str
    """Hash of the training samples' names, with which another folder of data is noticed."""
    steps: int
    """Steps of the whole stage."""
    validate: Callable[[int], bool] | None = None
    """Makes the validation samples after a number of steps, if they are due; returns False if a signal cut it short."""
