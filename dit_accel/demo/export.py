"""Writes the trained parts as a diffusers repository, and what the training was."""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from .config import TrainConfig

FORMAT_VERSION = 1


def processor_name() -> str:
    """The processor's model, without anything that names the machine itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, for records: no host names, no paths."""
    import diffusers
    import transformers

    machine: dict[str, Any] = {"processor": processor_name(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return {
        "machine": machine,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }


def training_record(
    config: TrainConfig, seconds: dict[str, float], device: torch.device
) -> dict[str, Any]:
    """The recipe, the time each stage took, and where."""
    return {
        "format_version": FORMAT_VERSION,
        "config": config.to_dict(),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "seconds_total": round(sum(seconds.values()), 1),
        **environment(device),
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
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        pipeline.save_pretrained(temporary, safe_serialization=True)
        _tidy_configs(temporary)
        os.replace(temporary, output)  # also over an empty folder
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
