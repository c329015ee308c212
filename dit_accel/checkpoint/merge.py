"""`merge`: write tuned transformer weights as a diffusers repository, with their SLA checkpoint."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_accel.checkpoint.companion import digest_of
from dit_accel.checkpoint.file import (
    FILE_NAME,
    SLACheckpoint,
    read_checkpoint,
)
from dit_accel.checkpoint.identity import identity_of, public_name
from dit_accel.checkpoint.repository import (
    check_output,
    empty_transformer,
    fill,
    without_weights,
    write_repository,
)
from dit_accel.checkpoint.state_dict import plain_tensors
from dit_accel.checkpoint.tensors import read_weights
from dit_accel.tensor_files import mismatch


def merge(
    model: str | os.PathLike,
    transformer: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    sla_checkpoint: str | os.PathLike | None = None,
) -> Path:
    """Write a copy of the repository `model` with the tuned weights in its transformer.

    Args:
        model: folder of a diffusers repository of the same architecture.
        transformer: the tuned weights: a folder that `save_pretrained` wrote (of the transformer or of the
            whole pipeline), or a safetensors file with the transformer's state dict. Prefixes that DDP, FSDP,
            `torch.compile` and training loops put on the keys are removed. If the weights of sparse attention
            are among them (`*.sla.*`), `sla_checkpoint` is required, and its weights are the ones written.
        output_dir: folder to write; must not exist, or be empty.
        sla_checkpoint: folder or file that `save_sla` wrote. It is written beside the weights, which become
            its base model. Default: none. An `sla.safetensors` in `model` belongs to the weights there and is
            not copied.

    Returns:
        `output_dir`.

    Raises:
        ValueError: a bad argument, or weights that do not fit. Nothing is written.
    """
    output = check_output(output_dir)
    tuned = empty_transformer(model)
    stored = None if sla_checkpoint is None else read_checkpoint(_file(sla_checkpoint))
    name = f"transformer={str(transformer)!r}"
    roots = {key.split(".")[0] for key in tuned.state_dict()}
    weights = plain_tensors(_read(Path(transformer), tuned, name), roots, name)
    plain = _without_sla(weights, stored, name)
    fill(tuned, plain, name)
    if stored is not None:
        base = identity_of(tuned)
        try:
            if stored.companion is None or stored.companion.digest != digest_of(plain):
                stored.base.check(base)
        except ValueError as error:
            raise ValueError(f"sla_checkpoint={str(sla_checkpoint)!r}: {error}") from None
        base = replace(base, model=public_name(output))
        stored = replace(stored, base=base, companion=None)
    write_repository(model, output, tuned, stored)
    return output


def _file(sla_checkpoint: str | os.PathLike) -> Path:
    path = Path(sla_checkpoint)
    return path / FILE_NAME if path.is_dir() else path


def _read(path: Path, transformer: Any, name: str) -> dict[str, Tensor]:
    """Return the state dict, memory-mapped."""
    if (path / "model_index.json").is_file():
        path = path / "transformer"
    if path.is_dir():
        _check_config(path, transformer, name)
    weights = read_weights(path, name)
    if any(".lora_A." in key for key in weights):
        raise ValueError(
            f"{name}: holds adapters; accepted are whole weights: those of `dit-accel finetune --merge`, or of "
            "save_pretrained after load_lora_weights, fuse_lora and unload_lora_weights"
        )
    return weights


def _check_config(folder: Path, transformer: Any, name: str) -> None:
    """Refuse tuned weights with another config: weights of equal shapes may still mean something else."""
    tuned = without_weights(type(transformer), folder, name)
    mine, other = (_plain(x.config) for x in (transformer, tuned))
    for key in sorted(mine.keys() | other.keys()):
        if mine.get(key) != other.get(key):
            raise ValueError(
                f"{name}: its config has {key}={other.get(key)!r}; accepted, as in model: {mine.get(key)!r}"
            )


def _plain(config: Any) -> dict[str, Any]:
    """Return a config without private entries (its origin), and with lists for tuples, as JSON has them."""
    return {key: json.loads(json.dumps(x)) for key, x in config.items() if not key.startswith("_")}


def _without_sla(
    weights: dict[str, Tensor], sla_checkpoint: SLACheckpoint | None, name: str
) -> dict[str, Tensor]:
    """Return the plain model's weights, after comparing those of sparse attention with the SLA checkpoint."""
    own = {key.replace(".sla.", ".", 1): x for key, x in weights.items() if ".sla." in key}
    if own:
        if sla_checkpoint is None:
            raise ValueError(
                f"{name}: holds weights of sparse attention (*.sla.*) but not its settings; accepted with "
                "sla_checkpoint, which has both"
            )
        found = {key: tuple(x.shape) for key, x in own.items()}
        if problem := mismatch(found, sla_checkpoint.weight_shapes()):
            raise ValueError(f"{name}: *.sla.* and the SLA checkpoint differ: {problem}")
    return {key: x for key, x in weights.items() if ".sla." not in key}
