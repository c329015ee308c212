"""`run_regression`: the regression as the first stage of a run: logged, ended by signals, equal in all processes."""

from collections.abc import Callable
from statistics import fmean
from typing import Any

from dit_accel.finetune.batch import Batch
from dit_accel.finetune.log import RunLog
from dit_accel.finetune.processes import Processes
from dit_accel.finetune.regression import regress
from dit_accel.finetune.stop import Interrupted, StopRequest

STAGE = "regression"


def run_regression(
    trainable: Any,
    sla: Any,
    batches: Callable[[int], Batch],
    config: Any,
    *,
    log: RunLog,
    stop: StopRequest,
    processes: Processes,
    progress: bool,
) -> None:
    """Fit the weights of sparse attention to the dense attention outputs of each layer.

    The stage writes no checkpoints: a run that ends in it begins it again, with the same result.

    Args:
        trainable, sla, config: as `regress` takes them.
        batches: the samples of this process in a step.

    Raises:
        Interrupted: a signal came to any process.
    """

    def on_step(step: int, values: dict[str, float]) -> None:
        log.write(STAGE, step + 1, values)
        asked = stop.name is not None
        if any(processes.gather(asked)):  # all of them leave after the same step
            raise Interrupted(stop.name or "a signal to another process", None)

    found = regress(
        trainable, sla, batches, config, processes=processes, progress=progress, on_step=on_step
    )
    if found.before:
        log.write(
            STAGE,
            config.regression_steps,
            {
                "error/before": fmean(found.before.values()),
                "error/after": fmean(found.after.values()),
            },
        )
    own = [x.data for layer in sla.layers.values() for x in layer.module.parameters()]
    processes.copy_from_main(own)
