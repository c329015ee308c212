"""Training checkpoints: safetensors and JSON only, written so that a crash never leaves a half one
in place."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.files import write_json

FORMAT_VERSION = 1
_MANIFEST = "state.json"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter index>.<name>`; the hyper-parameters come from the code
    instead."""
    states = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, state in states.items()
        for name, value in state.items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def save_checkpoint(
    directory: Path,
    step: int,
    modules: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    info: dict[str, Any],
    keep: int = 2,
) -> None:
    """Writes `directory/step-NNNNNN` and removes all but the newest `keep` checkpoints.

    `info` is stored in the manifest, which is written last: a folder without a valid one does not
    count.
    """
    from safetensors.torch import save_file

    target = directory / f"step-{step:06d}"
    temporary = directory / f".step-{step:06d}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    contents = {f"{name}.safetensors": module.state_dict() for name, module in modules.items()}
    contents |= {f"{name}.safetensors": _optimizer_tensors(opt) for name, opt in optimizers.items()}
    sizes = {}
    for name, tensors in contents.items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary / name)
        _fsync(temporary / name)
        sizes[name] = (temporary / name).stat().st_size
    write_json(
        temporary / _MANIFEST,
        {"format_version": FORMAT_VERSION, "step": step, "files": sizes, "info": info},
    )
    _fsync(temporary)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    _fsync(directory)
    for old in sorted(directory.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest if it is readable and every file has the size it names, else None."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        complete = manifest["format_version"] == FORMAT_VERSION and all(
            (folder / name).stat().st_size == size for name, size in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return None
    return manifest if complete else None


def load_checkpoint(
    directory: Path, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]
) -> tuple[int, dict[str, Any]]:
    """Loads the newest valid checkpoint in place; returns its step and info, or (0, {}) if there is
    none."""
    from safetensors.torch import load_file

    for folder in sorted(directory.glob("step-*"), reverse=True):
        manifest = _manifest(folder)
        if manifest is None:
            continue
        for name, module in modules.items():
            module.load_state_dict(load_file(folder / f"{name}.safetensors"))
        for name, optimizer in optimizers.items():
            _load_optimizer(optimizer, load_file(folder / f"{name}.safetensors"))
        return manifest["step"], manifest["info"]
    return 0, {}
