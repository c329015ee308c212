"""Train the CNN of the demo's judge from scratch, which takes a few seconds on a CPU core.

python eval/train_judge.py --output assets/judge.safetensors
"""

from pathlib import Path

import torch
import tyro
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from dit_accel.demo.clips import FP32, coverage, describe_clips
from dit_accel.demo.judge import ShapeJudge, crop_objects
from dit_accel.demo.vocabulary import SHAPES
from dit_accel.files import atomic_path


def blur(mask: Float[Tensor, "n h w"], sigma: float) -> Float[Tensor, "n h w"]:
    kernel = torch.exp(-0.5 * (torch.arange(-3.0, 4.0) / max(sigma, 1e-3)) ** 2)
    kernel = kernel / kernel.sum()
    mask = F.conv2d(mask[:, None], kernel[None, None, :, None], padding=(3, 0))
    return F.conv2d(mask, kernel[None, None, None, :], padding=(0, 3))[:, 0]


def training_batch(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return crops of drawings and their shapes. Blur and noise imitate the output of a decoder."""
    shape = torch.randint(len(SHAPES), (count,), generator=generator)
    clips = describe_clips([(s, 0, 0) for s in shape.tolist()], generator)
    side = int(torch.randint(48, 97, (), generator=generator))
    mask = coverage(clips, 1, side, side)[:, 0]
    mask = blur(mask, 1.6 * torch.rand((), generator=generator, dtype=FP32).item())
    noise = torch.randn(mask.shape, generator=generator, dtype=FP32) * (mask > 0.05)
    amount = 0.12 * torch.rand((), generator=generator, dtype=FP32)
    return crop_objects((mask + amount * noise).clamp(0, 1)), shape


def train_shape_judge(seed: int = 0, steps: int = 300, batch_size: int = 64) -> ShapeJudge:
    """Train the CNN, which takes a few seconds on a CPU core. Equal arguments give equal weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = ShapeJudge()
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        crops, shape = training_batch(batch_size, generator)
        optimizer.zero_grad()
        F.cross_entropy(judge(crops), shape).backward()
        optimizer.step()
        schedule.step()
    return judge.eval().requires_grad_(False)


def main(output: Path, seed: int = 0) -> None:
    """Train and write the weights as safetensors in fp16.

    Args:
        output: file to write.
        seed: seed of the drawings and the initial weights.
    """
    judge = train_shape_judge(seed)
    with atomic_path(output) as temporary:
        save_file({k: v.half().contiguous() for k, v in judge.state_dict().items()}, temporary)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
