"""Command `dit-accel convert`."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from dit_accel.cli.printing import print_line


@dataclass(kw_only=True)
class Convert:
    """Convert a TurboDiffusion checkpoint (Wan2.1 with SLA) to a diffusers repository with sla.safetensors."""

    checkpoint: Positional[Path]
    """TurboDiffusion checkpoint: a .pth file, not quantised."""
    model: Path
    """Folder of a diffusers repository of Wan2.1 of the same size. All files except the transformer are copied from it."""
    output_dir: Path
    """Folder to write. It must be empty or not exist."""
    topk: float = 0.1
    """Fraction of key blocks that each query block reads exactly, in (0, 1]."""
    block_q: int = 128
    """Tokens per query block. TurboDiffusion trains with blocks of 64 x 64 and samples with 128 x 64 (Hopper: 64 x 128)."""
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
        print_line(str(output))
