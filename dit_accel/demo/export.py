"""Writes the trained parts as a diffusers repository, and what the training was."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from dit_accel.environment import machine, versions
from dit_accel.files import atomic_directory

from .config import Recipe

FORMAT_VERSION = 1


def training_record(
    config: Recipe, seconds: dict[str, float], device: torch.device
) -> dict[str, Any]:
    """The recipe, the time each stage took, and where."""
    return {
        "format_version": FORMAT_VERSION,
        "config": config.to_dict(),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "seconds_total": round(sum(seconds.values()), 1),
        "device": device.type,
        "machine": machine(),
        "versions": versions(),
    }


def _tidy_configs(folder: Path) -> None:
    """Drops `_name_or_path` (a folder of the machine that trained) and makes fp32 the default when
    loading.

    transformers loads in the dtype that the config names, diffusers in fp32; a CPU has no use for
    fp16.
    """
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            continue
        before = dict(content)
        content.pop("_name_or_path", None)
        if "dtype" in content:
            content["dtype"] = "float32"
        if content != before:
            path.write_text(json.dumps(content, indent=2) + "\n")


def export_pipeline(output: Path, pipeline: type, scheduler: Any, parts: dict[str, Any]) -> None:
    """Saves a pipeline of this class with fp16 weights. `output` appears complete or not at all; the
    parts stay fp32."""
    # Module.half rather than the models' own: diffusers keeps some layers in fp32, which doubles
    # their size.
    halves = {
        name: torch.nn.Module.half(copy.deepcopy(part).cpu().eval())
        if isinstance(part, torch.nn.Module)
        else part
        for name, part in parts.items()
    }
    pipe: Any = pipeline(scheduler=scheduler, **halves)
    with atomic_directory(output) as temporary:
        pipe.save_pretrained(temporary, safe_serialization=True)
        _tidy_configs(temporary)
        for weights in temporary.rglob("*.safetensors"):
            weights.chmod(0o644)  # safetensors writes files that only their owner can read
