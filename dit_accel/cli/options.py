"""What the sub-commands share: options of a model and of acceleration, and printing."""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, UseAppendAction

from dit_accel.checkpoint.file import SLACheckpoint
from dit_accel.cli.checkpoints import sla_settings
from dit_accel.config import RASConfig, SLAConfig
from dit_accel.sampling.settings import Dtype, Sampling

EMBEDDED = "tiny-wan"
EMBEDDED_IMAGE = "tiny-sd3"
FailIf = Annotated[tuple[str, ...], UseAppendAction]
"""`--fail_if`, which may be given several times."""


@dataclass(kw_only=True)
class ModelOptions:
    """What is sampled from, how, and where it goes."""

    model: str = EMBEDDED
    """Repository of Wan2.1, Stable Diffusion 3, Lumina-Next or Lumina-Image 2.0: hub id or folder;
    "tiny-wan" and "tiny-sd3" are the embedded demo models."""
    sampling: OmitArgPrefixes[Sampling] = field(default_factory=Sampling)
    seed: int = 0
    output_dir: Path = Path("outputs")
    fps: float = 16.0
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    dtype: Dtype = "auto"
    revision: str | None = None
    """Branch, tag or commit of a hub repository."""
    cpu_offload: bool = False
    """Keep on the GPU only the part that works (enable_model_cpu_offload)."""
    format: Literal["human", "json"] = "human"
    """How the result is printed on stdout."""

    def resolve(self) -> tuple[str | os.PathLike, Sampling]:
        """Where the model lies, and the sampling arguments with its defaults."""
        if self.model not in (EMBEDDED, EMBEDDED_IMAGE):
            return self.model, self.sampling
        from dit_accel import demo
        from dit_accel.files import model_source

        defaults = demo.SAMPLING if self.model == EMBEDDED else demo.IMAGE_SAMPLING
        return model_source(self.model), self.sampling.filled(defaults)

    @property
    def hub(self) -> dict[str, Any]:
        """Arguments for the hub."""
        return {} if self.revision is None else {"revision": self.revision}

    def load(
        self, sla: SLAConfig | SLACheckpoint | None = None, ras: RASConfig | None = None
    ) -> tuple[Any, Sampling]:
        """The pipeline, ready to run, and its sampling arguments."""
        from dit_accel.files import check_writable
        from dit_accel.sampling.load import load_pipeline

        check_writable(self.output_dir, "output_dir")
        source, sampling = self.resolve()
        pipe = load_pipeline(
            source,
            sla=sla,
            ras=ras,
            device=self.device,
            dtype=self.dtype,
            cpu_offload=self.cpu_offload,
            **self.hub,
        )
        pipe.check_sizes(**sampling.call_arguments())
        return pipe, sampling


@dataclass(kw_only=True)
class AccelerationOptions(ModelOptions):
    """The same, and what accelerates it."""

    sla: str = "auto"
    """Sparse attention: quality, balanced, fast, a YAML file, a folder with sla.safetensors, or none;
    auto is the model's own sla.safetensors, and balanced without one."""
    ras: str = "none"
    """Region-adaptive sampling: quality, balanced, fast, paper, a YAML file, or none."""
    topk: float | None = None
    """Overrides the share of key blocks that is read exactly, in (0, 1]; not with sla.safetensors."""
    crossover: Literal["auto", "never"] | None = None
    """Overrides crossover: auto = dense where sparse was measured to lose, never = always sparse."""

    def sla_config(self) -> SLAConfig | SLACheckpoint | None:
        """The settings, overrides applied; None for dense."""
        source, _ = self.resolve()
        return sla_settings(self.sla, source, self.hub, topk=self.topk, crossover=self.crossover)

    def ras_config(self) -> RASConfig | None:
        """The settings; None for all tokens in each step."""
        return None if self.ras == "none" else RASConfig.load(self.ras)


def print_line(text: str) -> None:
    """One line on stdout."""
    sys.stdout.write(text + "\n")


def print_json(data: Any) -> None:
    """For programs."""
    print_line(json.dumps(data, indent=2, ensure_ascii=False))


def fail_on(reasons: list[str]) -> None:
    """Exit with 3 if a --fail_if condition holds."""
    if reasons:
        for reason in reasons:
            sys.stderr.write(f"fail_if: {reason}\n")
        raise SystemExit(3)
