"""Training of the CNN of the demo's judge (eval/train_judge.py)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from dit_accel.bench.train_extractor import save_half
from dit_accel.demo.clips import FP32, coverage, describe_clips
from dit_accel.demo.judge import ShapeJudge, crop_objects
from dit_accel.demo.vocabulary import SHAPES


def blurred_masks(mask: Float[Tensor, "n h w"], sigma: float) -> Float[Tensor, "n h w"]:
    """Blur all masks with one Gaussian; they lose 3 pixels at each border."""
    kernel = torch.exp(-0.5 * (torch.arange(-3.0, 4.0) / max(sigma, 1e-3)) ** 2)
    kernel = kernel / kernel.sum()
    mask = F.conv2d(mask[:, None], kernel[None, None, :, None], padding=(3, 0))
    return F.conv2d(mask, kernel[None, None, None, :], padding=(0, 3))[:, 0]


def crop_batch(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return crops of drawings and their shapes. Blur and noise imitate the output of a decoder."""
    shape = torch.randint(len(SHAPES), (count,), generator=generator)
    clips = describe_clips([(s, 0, 0) for s in shape.tolist()], generator)
    side = int(torch.randint(48, 97, (), generator=generator))
    mask = coverage(clips, 1, side, side)[:, 0]
    mask = blurred_masks(mask, 1.6 * torch.rand((), generator=generator, dtype=FP32).item())
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
        crops, shape = crop_batch(batch_size, generator)
        optimizer.zero_grad()
        F.cross_entropy(judge(crops), shape).backward()
        optimizer.step()
        schedule.step()
    return judge.eval().requires_grad_(False)


@dataclass
class JudgeTraining:
    """Training of the CNN, with the weights written as safetensors in fp16."""

    output: Path
    """File to write."""
    seed: int = 0
    """Seed of the drawings and the initial weights."""

    def run(self) -> None:
        """Train and write the weights."""
        save_half(train_shape_judge(self.seed), self.output)
