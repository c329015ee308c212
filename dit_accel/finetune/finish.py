"""Write the result, training curves and model card at the end of a run, and upload them."""

from pathlib import Path
from typing import Any

import torch

from dit_accel.checkpoint.identity import public_name
from dit_accel.files import naming_failures
from dit_accel.finetune.assemble import mark_calibrated
from dit_accel.finetune.card import write_card
from dit_accel.finetune.curves import FILE_NAME as CURVES
from dit_accel.finetune.curves import draw_curves
from dit_accel.finetune.engine import Engine, whole
from dit_accel.finetune.log import FILE_NAME as LOG
from dit_accel.finetune.model import load_model
from dit_accel.finetune.parameters import prepare
from dit_accel.finetune.result import push_result, write_result
from dit_accel.finetune.state import TrainingState
from dit_accel.runtime.install import method_of


def finish(pipe: Any, config: Any, folder: Path, engine: Engine, state: TrainingState) -> None:
    """Write the result of a run. With `use_ema` it holds the averaged weights. Every process must call it.

    Args:
        pipe: the trained pipeline.
        config: settings of the run (`FinetuneConfig`).
        folder: output folder of the run.
        engine: engine of the run.
        state: training state with the trained weights and their averages.

    Raises:
        RuntimeError: in every process, if a file could not be written or the hub refused the upload.
    """
    with state.averaged():
        if engine.is_sharded:
            pipe = whole_pipeline(config, state, is_main=engine.processes.is_main)
        engine.processes.main_only(lambda: write_all(pipe, config, folder, state.counters))


def write_all(pipe: Any, config: Any, folder: Path, counters: dict[str, Any]) -> None:
    """Write weights, curves and model card, and upload them with `push_to_hub`."""
    write_result(pipe, config, folder)
    with naming_failures("the trained weights are written"):
        if (folder / LOG).stat().st_size:
            draw_curves(folder / LOG, folder / CURVES)
        write_card(
            folder,
            config,
            pipeline=type(pipe).__qualname__,
            base=public_name(config.pretrained_model_name_or_path),
            counters=counters,
        )
    if config.push_to_hub:
        push_result(folder, config)


def whole_pipeline(config: Any, state: TrainingState, *, is_main: bool) -> Any:
    """Gather the sharded weights into a new pipeline on the CPU. Every process must call it.

    Args:
        config: settings of the run (`FinetuneConfig`).
        state: training state with sharded weights.
        is_main: True in the main process.

    Returns:
        The pipeline in the main process, None in all other processes.
    """
    tensors = {}
    for name, x in state.named.items():
        full = whole(x.detach())  # collective call of all processes
        if is_main:
            tensors[name] = full.cpu()
    if not is_main:
        return None
    pipe = load_model(config, torch.device("cpu"))
    with torch.no_grad():
        for name, x in prepare(pipe.transformer, config).named.items():
            x.copy_(tensors[name])
    mark_calibrated(method_of(pipe.transformer, "sla"))
    return pipe
