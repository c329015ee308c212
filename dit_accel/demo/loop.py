"""The training loop that every stage shares: seeded steps, a learning-rate schedule, checkpoints, a
progress bar."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class Stage:
    """One stage of the training and everything that decides its outcome besides the step function."""

    name: str
    steps: int
    settings: dict[str, Any]
    """Compared with the checkpoint's on resuming: a stage is never continued under other settings."""
    warmup: int = 50
    """Steps over which the learning rate rises."""
    decay: float = 0.5
    """The last share of the steps, over which the learning rate falls linearly."""
    floor: float = 0.01
    """What it falls to, as a share of its peak."""
    seed: int = 0
    save_every: int = 200
    """Steps between checkpoints."""

    def learning_rate(self, step: int) -> float:
        """The learning rate's share of its peak at a step."""
        rise = min(1.0, (step + 1) / self.warmup)
        fall = min(1.0, (1 - step / self.steps) / self.decay)
        return rise * max(self.floor, fall)


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """A CPU generator that depends on these three only, so that a resumed run draws the same
    numbers."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{stage}/{step}".encode()))


def running_average(averaged: nn.Module, trained: nn.Module, decay: float) -> Callable[[int], None]:
    """What keeps `averaged` the exponential average of `trained`'s parameters, for `after_step`; it
    forgets faster over the first steps."""
    into: list[Tensor] = list(averaged.parameters())
    source: list[Tensor] = list(trained.parameters())

    @torch.no_grad()
    def average(step: int) -> None:
        torch._foreach_lerp_(into, source, 1 - min(decay, (1 + step) / (10 + step)))

    return average


def run_stage(
    stage: Stage,
    directory: Path,
    modules: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    loss_of: Callable[[torch.Generator], Tensor],
    after_step: Callable[[int], None] | None = None,
    progress: bool = True,
) -> float:
    """Runs a stage to its end, from its newest checkpoint if there is one. Returns the seconds
    spent in it.

    Args:
        directory: where this stage's checkpoints go.
        modules: everything to checkpoint; parameters that require gradients are trained.
        optimizers: by name; a name must not be that of a module.
        loss_of: draws a batch from the generator and returns the loss.
        after_step: called with the step after each update.
    """
    from tqdm import tqdm

    start, info = load_checkpoint(directory, modules, optimizers)
    if start and info["settings"] != stage.settings:
        changed = [k for k in stage.settings if info["settings"].get(k) != stage.settings[k]]
        raise ValueError(
            f"work_dir holds a {stage.name!r} stage trained with other settings ({', '.join(changed)}); "
            "give another work_dir, or the settings it was started with"
        )
    spent = info.get("seconds", 0.0)
    if start >= stage.steps:
        return spent
    peaks = {name: [group["lr"] for group in opt.param_groups] for name, opt in optimizers.items()}
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    began = time.perf_counter()
    bar = tqdm(
        total=stage.steps, initial=start, desc=stage.name, disable=not progress, mininterval=2.0
    )
    smooth: float | None = None
    with bar:
        for step in range(start, stage.steps):
            factor = stage.learning_rate(step)
            for name, optimizer in optimizers.items():
                for group, peak in zip(optimizer.param_groups, peaks[name], strict=True):
                    group["lr"] = peak * factor
            loss = loss_of(step_generator(stage.seed, stage.name, step))
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if after_step is not None:
                after_step(step)
            smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
            bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
            bar.update()
            done = step + 1
            if done == stage.steps or done % stage.save_every == 0:
                seconds = spent + time.perf_counter() - began
                info = {"settings": stage.settings, "seconds": round(seconds, 1), "loss": smooth}
                save_checkpoint(directory, done, modules, optimizers, info)
    return spent + time.perf_counter() - began
