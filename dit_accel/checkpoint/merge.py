"""`merge`: write fine-tuned transformer weights and their SLA checkpoint as a diffusers repository."""

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
    """Write a copy of a diffusers repository with fine-tuned weights in its transformer.

    Args:
        model: folder of a diffusers repository of the same architecture.
        transformer: the fine-tuned weights: a folder written by `save_pretrained` of the transformer or of the
            pipeline, or a safetensors file with the state dict of the transformer. Key prefixes of DDP, FSDP,
            `torch.compile` and training loops are removed. If the state dict contains weights of sparse attention
            (`*.sla.*`), `sla_checkpoint` is required, and the weights of `sla_checkpoint` are written.
        output_dir: folder to write. It must be empty or not exist.
        sla_checkpoint: folder or file written by `save_sla`. It is written to the repository with the fine-tuned
            weights as its base model. Default: none. An `sla.safetensors` in `model` is never copied, because it
            belongs to the weights of `model`.

    Returns:
        The path of `output_dir`.

    Raises:
        ValueError: if an argument is invalid, or if the weights do not fit. Nothing is written then.
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
    """Return the memory-mapped state dict."""
    if (path / "model_index.json").is_file():
        path = path / "transformer"
    if path.is_dir():
        _check_config(path, transformer, name)
    weights = read_weights(path, name)
    if any(".lora_A." in key for key in weights):
        raise ValueError(
            f"{name}: holds adapters; expected full weights. Use `dit-accel finetune --merge`, or save_pretrained after "
            "load_lora_weights, fuse_lora and unload_lora_weights"
        )
    return weights


def _check_config(folder: Path, transformer: Any, name: str) -> None:
    """Check that the config of the fine-tuned weights is equal. Equal shapes alone do not prove equal models."""
    tuned = without_weights(type(transformer), folder, name)
    mine, other = (_plain(x.config) for x in (transformer, tuned))
    for key in sorted(mine.keys() | other.keys()):
        if mine.get(key) != other.get(key):
            raise ValueError(
                f"{name}: its config has {key}={other.get(key)!r}; expected {mine.get(key)!r}, as in model"
            )


def _plain(config: Any) -> dict[str, Any]:
    """Return a config without private entries, and with tuples converted to lists as in JSON."""
    return {key: json.loads(json.dumps(x)) for key, x in config.items() if not key.startswith("_")}


def _without_sla(
    weights: dict[str, Tensor], sla_checkpoint: SLACheckpoint | None, name: str
) -> dict[str, Tensor]:
    """Return the weights without those of sparse attention, after checking the latter against the SLA checkpoint."""
    own = {key.replace(".sla.", ".", 1): x for key, x in weights.items() if ".sla." in key}
    if own:
        if sla_checkpoint is None:
            raise ValueError(
                f"{name}: holds weights of sparse attention (*.sla.*) without settings; set sla_checkpoint, which holds "
                "both"
            )
        found = {key: tuple(x.shape) for key, x in own.items()}
        if problem := mismatch(found, sla_checkpoint.weight_shapes()):
            raise ValueError(f"{name}: its weights *.sla.* do not fit sla_checkpoint: {problem}")
    return {key: x for key, x in weights.items() if ".sla." not in key}
