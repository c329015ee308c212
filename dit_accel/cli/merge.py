"""`dit-accel merge`."""

from dataclasses import dataclass
from pathlib import Path

from dit_accel.cli.printing import print_line


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
        print_line(str(output))
