"""`ValidationPlan`: schedule the validations of a run and log their metrics."""

import collections
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dit_accel.finetune.engine import Engine
from dit_accel.finetune.log import RunLog
from dit_accel.finetune.model import Helpers
from dit_accel.finetune.state import TrainingState
from dit_accel.finetune.stop import CutShort, Interrupted, StopRequest
from dit_accel.finetune.validation import Validator
from dit_accel.runtime.install import method_of

DEFAULT_STEPS = 500
"""Default of `validation_steps`."""


class ValidationPlan:
    """Run validations before the first step, every `validation_steps` steps, and after the last step.

    The constructor makes the dense samples. Create the plan before sparse attention is installed and before any
    weight changes.

    Args:
        pipe: the pipeline to train, without acceleration.
        config: settings of the run (`FinetuneConfig`).
        folder: output folder of the run.
        buckets: buckets of the training samples. Validation samples have the size of the most frequent bucket.
        text_tokens: number of text tokens of a prompt, as in training.
        engine: engine of the run.
        helpers: text encoders and VAE of the pipeline.
        log: log of the run.
        stop: signal handler of the run.

    Raises:
        ValueError: if a prompt or size cannot be sampled.
        Interrupted: if a signal was received.
    """

    def __init__(
        self,
        pipe: Any,
        config: Any,
        folder: Path,
        *,
        buckets: Sequence[str],
        text_tokens: int,
        engine: Engine,
        helpers: Helpers,
        log: RunLog,
        stop: StopRequest,
    ) -> None:
        self.pipe, self.config, self.engine = pipe, config, engine
        self.helpers, self.log, self.stop = helpers, log, stop
        self.every = config.validation_steps or DEFAULT_STEPS
        self.state: TrainingState | None = None
        """Training state whose averaged weights are validated; None validates the current weights."""
        self.validator: Validator | None = None
        if config.validation_prompts is None:
            return
        self.validator = Validator(
            pipe,
            config,
            folder,
            size=most_frequent_size(buckets),
            text_tokens=text_tokens,
            processes=engine.processes,
            together=engine.is_sharded,
            stopping=lambda: stop.name is not None,
        )
        try:
            self.validator.make_references()
        except CutShort:
            self._interrupt()

    def run(self, stage: str, done: int, *, last: bool = False) -> bool:
        """Run and log a validation if it is due and the log does not have it yet.

        Args:
            stage: name of the stage.
            done: number of finished steps of the stage.
            last: True if the stage has no further steps.

        Returns:
            False if a signal interrupted the validation. The caller must then save a checkpoint.

        Raises:
            Interrupted: if a signal interrupted the validation and there is no state to save yet.
        """
        if self.validator is None or (stage, done) in self.log.validated:
            return True
        if done % self.every and not last:
            return True
        if self.config.topk_start is not None:
            method_of(self.pipe, "sla").set_topk(self.config.sla["topk"])
        averaged = contextlib.nullcontext() if self.state is None else self.state.averaged()
        try:
            with averaged, self.helpers.on_device(), self.engine.accelerator.autocast():
                means = self.validator.run(f"{stage}-{done:06d}")
        except CutShort:
            if self.state is not None:
                return False
            self._interrupt()
        if self.engine.processes.is_main and self.validator.sheet is not None:
            self.engine.log_picture(f"{stage}/validation", self.validator.sheet, done)
        self.log.write(stage, done, {f"validation/{key}": x for key, x in means.items()})
        return True

    def _interrupt(self) -> NoReturn:
        raise Interrupted(self.stop.name or "a signal to another process", None)


def most_frequent_size(buckets: Sequence[str]) -> tuple[int, int, int]:
    """Return (frames, height, width) of the most frequent bucket, given names such as "33x64x64"."""
    [(bucket, _)] = collections.Counter(buckets).most_common(1)
    frames, height, width = map(int, bucket.split("x"))
    return frames, height, width
