"""The first stage as a run sees it: logged, interruptible, equal in all processes."""

from collections.abc import Callable
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
    """Fit the weights of sparse attention layer by layer.

    Every process does all of it on the same batches, and takes the result of the first one. A run that is killed
    in this stage begins it again: it is short.

    Args:
        trainable, sla, batches, config: as `regress` takes them.

    Raises:
        Interrupted: a signal came.
    """

    def on_step(step: int, values: dict[str, float]) -> None:
        log.write(STAGE, step + 1, values)
        if stop.name is not None:
            raise Interrupted(stop.name, None)

    regress(trainable, sla, batches, config, progress=progress, on_step=on_step)
    own = [x.data for layer in sla.layers.values() for x in layer.module.parameters()]
    processes.copy_from_main(own)
