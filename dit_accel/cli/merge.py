"""`dit-accel merge`."""

from dataclasses import dataclass
from pathlib import Path

from dit_accel.cli.printing import print_line


@dataclass(kw_only=True)
class Merge:
    """Bake fully tuned weights into a normal diffusers repository, with their SLA checkpoint beside them."""

    model: Path
    """Folder of the diffusers repository that was tuned."""
    transformer: Path
    """The tuned weights: a folder that save_pretrained wrote, or a safetensors file with the state dict."""
    output_dir: Path
    """Must not exist yet, or be empty."""
    adapter: Path | None = None
    """The sla.safetensors trained with them, or its folder."""

    def run(self) -> None:
        from dit_accel.checkpoint.merge import merge

        print_line(str(merge(self.model, self.transformer, self.output_dir, adapter=self.adapter)))
