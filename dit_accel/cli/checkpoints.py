"""SLA checkpoints on the command line: `dit-accel merge`, `dit-accel convert`, and `--sla`."""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from dit_accel.checkpoint.file import FILE_NAME, SLACheckpoint, read_checkpoint, settings_of
from dit_accel.config import SLAConfig


def sla_settings(
    sla: str,
    model: str | os.PathLike,
    hub: dict[str, Any],
    *,
    topk: float | None = None,
    crossover: Literal["auto", "never"] | None = None,
) -> SLAConfig | SLACheckpoint | None:
    """What `--sla`, `--topk` and `--crossover` mean; None for dense."""
    if sla == "none":
        if topk is not None or crossover is not None:
            raise ValueError("sla='none': dense; accepted without topk and crossover")
        return None
    settings = _own_settings(model, hub) if sla == "auto" else settings_of(sla)
    if isinstance(settings, SLAConfig):
        overrides: dict[str, Any] = {"topk": topk, "crossover": crossover}
        return replace(settings, **{k: x for k, x in overrides.items() if x is not None})
    if settings is not None and topk is not None:
        raise ValueError(
            f"topk={topk}: part of what {FILE_NAME} was trained for; accepted with a preset or a YAML file"
        )
    if settings is not None and crossover is not None:
        settings = replace(settings, config=replace(settings.config, crossover=crossover))
    return settings


def _own_settings(model: str | os.PathLike, hub: dict[str, Any]) -> SLAConfig | SLACheckpoint:
    from dit_accel.checkpoint.repository import read_index
    from dit_accel.checkpoint.save_load import own_checkpoint

    read_index(model, **hub)  # which says what is wrong with a model that cannot be read
    path = own_checkpoint(model, **hub)
    return SLAConfig.load("balanced") if path is None else read_checkpoint(path)


@dataclass(kw_only=True)
class Merge:
    """Write tuned weights as a diffusers repository, with their SLA checkpoint beside them."""

    model: Path
    """Folder of the diffusers repository that was tuned."""
    transformer: Path
    """The tuned weights: a folder that save_pretrained wrote, or a safetensors file with the state dict."""
    output_dir: Path
    """Must not exist yet, or be empty."""
    sla_checkpoint: Path | None = None
    """The sla.safetensors that was trained with the weights, or its folder."""

    def run(self) -> None:
        from dit_accel.checkpoint.merge import merge

        output = merge(
            self.model, self.transformer, self.output_dir, sla_checkpoint=self.sla_checkpoint
        )
        sys.stdout.write(f"{output}\n")


@dataclass(kw_only=True)
class Convert:
    """Turn a TurboDiffusion checkpoint (Wan2.1 with SLA) into a diffusers repository with sla.safetensors."""

    checkpoint: Positional[Path]
    """A .pth file, not quantised."""
    model: Path
    """Folder of a diffusers repository of Wan2.1 of the same size; all but the transformer is copied."""
    output_dir: Path
    """Must not exist yet, or be empty."""
    topk: float = 0.1
    """Share of key blocks that is read exactly, in (0, 1]."""
    block_q: int = 128
    """Tokens per query block. TurboDiffusion trains with 64 x 64 and serves with 128 x 64 (Hopper: 64 x 128)."""
    block_k: int = 64
    """Tokens per key block."""

    def run(self) -> None:
        from dit_accel.checkpoint.convert import convert

        output = convert(
            self.checkpoint,
            self.model,
            self.output_dir,
            topk=self.topk,
            block_q=self.block_q,
            block_k=self.block_k,
        )
        sys.stdout.write(f"{output}\n")
