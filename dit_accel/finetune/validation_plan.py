"""`ValidationPlan`: when a run validates, with which weights, and where that is logged."""

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
    """Validations of a run: before the first step, every `validation_steps` steps, and after the last one.

    Making it samples the dense clips, so that it is made before sparse attention is installed and before any
    weight changes.

    Args:
        pipe: the pipeline that trains, without acceleration.
        config: settings of the run (`FinetuneConfig`).
        folder: output folder of the run.
        buckets: buckets of the training samples; the most frequent one has the size of the validation samples.
        text_tokens: of a prompt, as in training.
        helpers: text encoders and VAE of the pipeline.

    Raises:
        ValueError: prompts or sizes that cannot be sampled.
        Interrupted: a signal came.
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
        """Whose averages are validated; None: the weights as they are."""
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
        """Validate if it is due and was not done before a resume; log the means.

        Args:
            stage: name of the stage.
            done: finished steps of the stage.
            last: whether there are no further steps.

        Returns:
            False if a signal cut it short in the last stage, whose state has to be saved then.

        Raises:
            Interrupted: a signal cut it short before anything can be saved.
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
    """Return frames, height and width of the bucket that most samples are in, such as "33x64x64"."""
    [(bucket, _)] = collections.Counter(buckets).most_common(1)
    frames, height, width = map(int, bucket.split("x"))
    return frames, height, width
