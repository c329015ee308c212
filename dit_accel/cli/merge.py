"""Command `dit-accel merge`."""

from dataclasses import dataclass
from pathlib import Path

from dit_accel.cli.printing import print_line


@dataclass(kw_only=True)
class Merge:
    """Write fine-tuned weights and their SLA checkpoint as a diffusers repository."""

    model: Path
    """Folder of the diffusers repository of the base model."""
    transformer: Path
    """Fine-tuned weights: a folder written by save_pretrained, or a safetensors file with the state dict."""
    output_dir: Path
    """Folder to write. It must be empty or not exist."""
    sla_checkpoint: Path | None = None
    """The sla.safetensors that was trained with the weights, or its folder. Default: none."""

    def run(self) -> None:
        from dit_accel.checkpoint.merge import merge

        output = merge(
            self.model, self.transformer, self.output_dir, sla_checkpoint=self.sla_checkpoint
        )
        print_line(str(output))
