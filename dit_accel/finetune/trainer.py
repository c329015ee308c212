"""`finetune`: run fine-tuning from the settings to the files of the result."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dit_accel.files import check_writable, model_source, naming_failures, write_json
from dit_accel.finetune import regression_stage
from dit_accel.finetune.annealing import topk_at
from dit_accel.finetune.assemble import calibrate, mark_calibrated, wrap_student
from dit_accel.finetune.checkpoints import Checkpoint
from dit_accel.finetune.checks import SOURCES
from dit_accel.finetune.config import FinetuneConfig
from dit_accel.finetune.curves import check_matplotlib
from dit_accel.finetune.data.open import open_samples
from dit_accel.finetune.data.order import Order
from dit_accel.finetune.data.samples import load_batch
from dit_accel.finetune.engine import Engine
from dit_accel.finetune.families import trainable_of
from dit_accel.finetune.feed import Feed
from dit_accel.finetune.finish import finish
from dit_accel.finetune.lock import RunLock
from dit_accel.finetune.log import RunLog
from dit_accel.finetune.loop import STAGE, Loop
from dit_accel.finetune.model import Helpers, load_model
from dit_accel.finetune.objectives import Objective
from dit_accel.finetune.parameters import prepare
from dit_accel.finetune.parts import Parts
from dit_accel.finetune.processes import Processes
from dit_accel.finetune.progress import StepMeter
from dit_accel.finetune.result import check_hub
from dit_accel.finetune.resume import check_samples, check_settings, choose_checkpoint, global_batch
from dit_accel.finetune.stop import CutShort, Interrupted, StopRequest
from dit_accel.finetune.teacher import make_teacher
from dit_accel.finetune.validation_plan import ValidationPlan
from dit_accel.finetune.validation_samples import validation_prompts
from dit_accel.runtime.install import method_of
from dit_accel.sampling.outline import read_outline

SETTINGS = "training_config.json"


def finetune(config: FinetuneConfig, *, progress: bool = True) -> Path:
    """Fine-tune a model with sparse attention, and write the result.

    Several processes started by torchrun share the work. A killed run resumes with
    `resume_from_checkpoint="latest"`. On a CPU the result is then bit-identical to an uninterrupted run.

    Args:
        config: settings of the run.
        progress: show progress bars on stderr.

    Returns:
        The folder of the result, `config.output_dir`: `sla.safetensors`, weights or adapters, README.md, curves.png,
        log.jsonl, validation samples and checkpoints.

    Raises:
        ValueError: if a setting is invalid, before any work starts.
        RuntimeError: if no parameter trains, if too many steps are not finite, or if a file could not be written.
        Interrupted: if SIGTERM or SIGINT was received. The run has been saved, and the exit code is 0.
    """
    check_before_loading(config)
    folder = check_writable(config.output_dir, "output_dir")
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        engine = Engine(config, folder)
        stack.callback(engine.close)
        processes = engine.processes
        processes.main_only(lambda: _lock(folder, stack))
        found = processes.main_only(lambda: begin(config, folder, processes.count))
        shown = progress and processes.is_main
        try:
            _train(config, folder, engine, stop, found, shown, stack)
        except Interrupted as interrupted:
            if processes.is_main:
                tqdm.write(
                    str(interrupted), file=sys.stderr
                )  # on a line of its own below the progress bar
            raise
    return folder


def _lock(folder: Path, stack: contextlib.ExitStack) -> None:
    stack.enter_context(RunLock(folder))


def check_before_loading(config: FinetuneConfig) -> None:
    """Check the settings as far as possible before weights are read.

    Raises:
        ValueError: if a setting is invalid.
    """
    source = model_source(config.pretrained_model_name_or_path)
    config.check_early(read_outline(source, **config.hub))
    check_matplotlib()
    if config.validation_prompts is not None:
        validation_prompts(config.validation_prompts)
    if config.push_to_hub:
        check_hub(config)


def begin(config: FinetuneConfig, folder: Path, processes: int) -> Checkpoint | None:
    """Choose the checkpoint to resume from, check that the settings match it, and write the settings to a file.

    Args:
        config: settings of the run.
        folder: output folder of the run.
        processes: number of processes.

    Returns:
        The checkpoint, or None for a new run.

    Raises:
        ValueError: see `choose_checkpoint` and `check_settings`.
        RuntimeError: if the settings could not be written.
    """
    settings = config.to_dict()
    found = choose_checkpoint(folder, config.resume_from_checkpoint)
    if found is not None:
        check_settings(found, settings, processes)
    with naming_failures():
        write_json(folder / SETTINGS, settings)
    return found


def _train(
    config: FinetuneConfig,
    folder: Path,
    engine: Engine,
    stop: StopRequest,
    found: Checkpoint | None,
    shown: bool,
    stack: contextlib.ExitStack,
) -> None:
    """Load the model and data, train, and write the result.

    Args:
        config: settings of the run.
        folder: output folder of the run.
        engine: engine of the run.
        stop: signal handler of the run.
        found: checkpoint to resume from. None for a new run.
        shown: show progress bars on stderr.
        stack: exit stack that closes files and threads at the end of the run.
    """
    processes, settings = engine.processes, config.to_dict()
    pipe = load_model(config, engine.device)
    transformer = pipe.transformer
    helpers = Helpers(pipe, engine.device, stay=config.instance_data_dir is not None)
    log = RunLog(
        folder,
        is_main=processes.is_main,
        after=None if found is None else (found.state["stage"], found.step),
        stages=(regression_stage.STAGE, STAGE),
    )
    stack.callback(log.close)
    # Pipelines expect all models in one dtype. With fp32 weights, autocast provides the dtype of the computation.
    with helpers.on_device(), engine.accelerator.autocast():
        trainable = trainable_of(pipe, max_sequence_length=config.max_sequence_length)
        samples = _opened(config, trainable, stop, processes, shown)
        if (tokens := _text_tokens(samples)) is not None:
            trainable.text_tokens = tokens
        null = trainable.encode_null()
        validation = ValidationPlan(
            pipe,
            config,
            folder,
            buckets=samples.buckets,
            text_tokens=trainable.text_tokens,
            engine=engine,
            helpers=helpers,
            log=log,
            stop=stop,
        )
    feed = _feed(config, samples, engine)
    stack.callback(feed.close)
    if found is not None:
        check_samples(found, feed.samples_sha256, SOURCES)
    log.start_tracker(engine.start_trackers())

    trained = prepare(transformer, config)
    sla = method_of(transformer, "sla")
    # The teacher copies the weights if they train, so it must be created before a checkpoint is loaded.
    teacher = None if config.loss == "diffusion" else make_teacher(trainable, config)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    objective = Objective(config, trainable, teacher, null)
    if found is None:
        with engine.accelerator.autocast():
            calibrate(sla, objective, transformer, feed.rows(0, 0, 1))
    regresses = found is None and regression_stage.STAGE in config.stages
    if regresses:
        validation.run(regression_stage.STAGE, 0)
        with engine.accelerator.autocast():
            regression_stage.run_regression(
                trainable,
                sla,
                lambda step: feed.micro(step, 0),
                config,
                log=log,
                stop=stop,
                processes=processes,
                progress=shown,
            )

    if engine.is_sharded and teacher is not None and teacher.model is not None:
        engine.wrap(teacher.model, trainable.blocks)
    model, state = wrap_student(engine, config, transformer, trained, trainable.blocks)
    if found is not None:
        state.load(found)
        mark_calibrated(sla)
    validation.state = state
    steps = config.max_train_steps if STAGE in config.stages else 0
    meter = StepMeter(
        patch_size=transformer.config.patch_size,
        device=engine.device,
        counters=state.counters,
        total=steps,
        start=0 if found is None else found.step,
        shown=shown,
    )
    stack.callback(meter.close)
    loop = Loop(
        Parts(
            config=config,
            folder=folder,
            engine=engine,
            model=model,
            objective=objective,
            feed=feed,
            state=state,
            log=log,
            stop=stop,
            meter=meter,
            sla=sla,
            topk_at=lambda step: _topk(config, step),
            saved_config=settings,
            samples_sha256=feed.samples_sha256,
            steps=steps,
            validate=lambda done: validation.run(STAGE, done, last=done == steps),
        ),
        0 if found is None else found.step,
    )
    if regresses:
        loop.save(0)  # a resumed run starts after the regression stage
    loop.run()
    meter.close()
    log.sync()
    engine.unwrap(model)
    if config.topk_start is not None:
        sla.set_topk(config.sla["topk"])
    finish(pipe, config, folder, engine, state)


def _opened(
    config: FinetuneConfig, trainable: Any, stop: StopRequest, processes: Processes, shown: bool
) -> Any:
    """Open the training samples.

    Raises:
        Interrupted: in every process, if any process received a signal while samples were made.
    """
    samples = None
    with contextlib.suppress(CutShort):
        samples = open_samples(
            config, trainable, progress=shown, stopping=lambda: stop.name is not None
        )
    if processes.sum(torch.tensor(float(samples is None))) > 0:
        raise Interrupted(stop.name or "a signal to another process", None)
    return samples


def _text_tokens(samples: Any) -> int | None:
    """Return the number of text tokens of stored samples; None if this run encodes the samples."""
    contents = getattr(samples, "contents", None)
    return None if contents is None else contents.settings["max_sequence_length"]


def _feed(config: FinetuneConfig, samples: Any, engine: Engine) -> Feed:
    processes = engine.processes
    size = global_batch(config.to_dict(), processes.count)
    return Feed(
        samples,
        Order(samples.buckets, size, config.seed),
        load_batch,
        size=config.train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        rank=processes.rank,
        processes=processes.count,
        device=engine.device,
        ahead=config.instance_data_dir is None,
    )


def _topk(config: FinetuneConfig, step: int) -> float | None:
    """Return topk for a step; None without annealing."""
    if config.topk_start is None or config.anneal_steps is None:
        return None
    return topk_at(step, start=config.topk_start, end=config.sla["topk"], steps=config.anneal_steps)
