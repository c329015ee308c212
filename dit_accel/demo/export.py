"""Writes the trained parts as a diffusers repository, and what the training was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dit_accel.environment import machine, versions
from dit_accel.files import atomic_directory

from .config import TrainConfig

FORMAT_VERSION = 1


def training_record(
    config: TrainConfig, seconds: dict[str, float], device: torch.device
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


def export_pipeline(
    output: Path, tokenizer: Any, text_encoder: Any, vae: Any, transformer: Any, shift: float
) -> None:
    """Saves a WanPipeline with fp16 weights. `output` appears complete or not at all; the parts
    stay fp32."""
    import copy

    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=shift,
    )
    # Module.half rather than the models' own: diffusers keeps some layers in fp32, which doubles
    # their size.
    text_encoder, vae, transformer = (
        torch.nn.Module.half(copy.deepcopy(part).cpu().eval())
        for part in (text_encoder, vae, transformer)
    )
    pipeline: Any = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=scheduler,
    )
    with atomic_directory(output) as temporary:
        pipeline.save_pretrained(temporary, safe_serialization=True)
        _tidy_configs(temporary)
        for weights in temporary.rglob("*.safetensors"):
            weights.chmod(0o644)  # safetensors writes files that only their owner can read
