"""Training loop of one stage: seeded steps, learning-rate schedule, Muon and AdamW, checkpoints, progress bar."""

import json
import time
import zlib
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.files import atomic_path, sync
from dit_accel.tensor_files import open_safetensors

Optimizers = dict[str, torch.optim.Optimizer]


@dataclass(frozen=True)
class Stage:
    """Training stage. Its length and learning rate come from settings that begin with `prefix`."""

    name: str
    prefix: str
    used: tuple[str, ...] = ("",)
    """Prefixes of the settings that decide the result. A stage only resumes if these settings are unchanged."""
    muon: float = 1.0
    """Learning rate of Muon over that of AdamW."""
    decay: float = 0.5
    """Last share of the steps, over which the learning rate falls linearly."""

    def learning_rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step as a share of its peak."""
        fall = min(1.0, (1 - step / steps) / self.decay)
        return min(1.0, (step + 1) / 50) * max(0.01, fall)


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """Return a CPU generator that depends on the arguments only, so that a resumed run draws equal numbers."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{stage}/{step}".encode()))


def muon_and_adamw(parameters: list[Tensor], rate: float, muon: float = 1.0) -> Optimizers:
    """Return the optimizers "muon", for matrices and kernels of at least 8 rows and columns, and "adamw" for the rest.

    The columns of a convolution kernel are all of its dimensions but the output channels.

    Args:
        parameters: trained parameters.
        rate: learning rate of AdamW.
        muon: learning rate of Muon over that of AdamW.
    """
    matrices = [p for p in parameters if p.ndim >= 2 and min(len(p), p[0].numel()) >= 8]
    ids = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in ids]
    # torch's Muon takes 2-D parameters only. These share the memory of the trained ones.
    flat = [nn.Parameter(p.data.view(len(p), -1)) for p in matrices]
    first = torch.optim.Muon(flat, muon * rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    def take_gradients(*_: Any) -> None:
        for matrix, parameter in zip(flat, matrices, strict=True):
            matrix.grad = None if parameter.grad is None else parameter.grad.flatten(1)

    first.register_step_pre_hook(take_gradients)
    adamw = torch.optim.AdamW(others, rate, betas=(0.9, 0.98), weight_decay=0.0)
    return {"muon": first, "adamw": adamw}


def run_stage(
    stage: Stage,
    config: dict[str, Any],
    directory: Path,
    model: nn.Module,
    loss_of: Callable[[torch.Generator], Tensor],
    averaged: nn.Module | None = None,
    progress: bool = True,
) -> float:
    """Run a stage to its end, from its newest checkpoint if there is one, and return the seconds spent in it.

    Args:
        stage: the stage.
        config: settings of the recipe.
        directory: folder of the checkpoints.
        model: module whose parameters are trained.
        loss_of: draws a batch with the generator and returns the loss.
        averaged: copy of the model for the exponential average of its weights.
        progress: show a progress bar on stderr.
    """
    from tqdm import tqdm

    steps, rate = config[f"{stage.prefix}_steps"], config[f"{stage.prefix}_learning_rate"]
    unused = ("save_every", "full_") if stage.prefix == "short" else ("save_every",)
    settings = {k: v for k, v in config.items() if k.startswith(stage.used)}
    settings = {k: v for k, v in settings.items() if not k.startswith(unused)}
    parameters: list[Tensor] = list(model.parameters())
    optimizers = muon_and_adamw(parameters, rate, stage.muon)
    modules = {"model": model} if averaged is None else {"model": model, "ema": averaged}
    start, info = _load_checkpoint(directory, modules, optimizers)
    if start and info["settings"] != settings:
        changed = [k for k in settings if info["settings"].get(k) != settings[k]]
        raise ValueError(
            f"work_dir: its stage {stage.name!r} was trained with other settings ({', '.join(changed)}); use "
            "another work_dir or the former settings"
        )
    spent, smooth = info.get("seconds", 0.0), None
    began = time.perf_counter() - spent
    with tqdm(initial=start, total=steps, desc=stage.name, disable=not progress) as bar:
        for step in range(start, steps):
            loss = loss_of(step_generator(config["seed"], stage.name, step))
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for name, optimizer in optimizers.items():
                peak = rate * (stage.muon if name == "muon" else 1.0)
                optimizer.param_groups[0]["lr"] = peak * stage.learning_rate(step, steps)
                optimizer.step()
            model.zero_grad()
            if averaged is not None:  # the average forgets faster over the first steps
                share = 1 - min(config["ema"], (1 + step) / (10 + step))
                with torch.no_grad():
                    torch._foreach_lerp_(list(averaged.parameters()), parameters, share)
            smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
            bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
            bar.update()
            spent = time.perf_counter() - began
            if step + 1 == steps or (step + 1) % config["save_every"] == 0:
                info = {"step": step + 1, "settings": settings, "seconds": spent}
                _save_checkpoint(directory, modules, optimizers, info)
    return spent


def _save_checkpoint(
    directory: Path, modules: dict[str, nn.Module], optimizers: Optimizers, info: dict[str, Any]
) -> None:
    """Write one safetensors file, which appears only when it is complete, then remove all but the newest two."""
    from safetensors.torch import save_file

    parts = {name: module.state_dict() for name, module in modules.items()}
    for name, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            parts[f"{name}.{index}"] = {k: torch.as_tensor(x) for k, x in state.items()}
    tensors = {f"{n}.{k}": x.contiguous() for n, part in parts.items() for k, x in part.items()}
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_path(directory / f"step-{info['step']:06d}.safetensors") as temporary:
        save_file(tensors, temporary, {"info": json.dumps(info)})
    sync(directory)
    for old in sorted(directory.glob("step-*.safetensors"))[:-2]:
        old.unlink()


def _load_checkpoint(
    directory: Path, modules: dict[str, nn.Module], optimizers: Optimizers
) -> tuple[int, dict[str, Any]]:
    """Load the newest readable checkpoint in place, and return its step and info, or (0, {})."""
    for path in sorted(directory.glob("step-*.safetensors"), reverse=True):
        with suppress(ValueError), open_safetensors(path) as file:
            info = json.loads(file.metadata()["info"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            break
    else:
        return 0, {}
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        name, rest = key.split(".", 1)
        parts[name][rest] = value
    for name, module in modules.items():
        module.load_state_dict(parts[name])
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for key, value in parts[name].items():
            index, field = key.split(".")
            state[int(index)][field] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": dict(state), "param_groups": groups})
    return info["step"], info
