"""`run_regression`: run the regression stage with logging, signal handling and several processes."""

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
    """Run the regression stage.

    The stage writes no checkpoints. A run that is interrupted in this stage starts it again, with the same result.

    Args:
        trainable: model, see `regress`.
        sla: sparse attention installed on its transformer.
        batches: function that returns the samples of this process in a step.
        config: settings of the run (`FinetuneConfig`).
        log: log of the run.
        stop: signal handler of the run.
        processes: processes of the run.
        progress: show a progress bar on stderr.

    Raises:
        Interrupted: in every process, if any process received a signal.
    """

    def on_step(step: int, values: dict[str, float]) -> None:
        log.write(STAGE, step + 1, values)
        asked = stop.name is not None
        if any(processes.gather(asked)):  # all processes stop after the same step
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
