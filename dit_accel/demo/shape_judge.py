"""A small CNN that names the shape in a mask. It is trained on clean drawings and never sees the
model's output."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from dit_accel.files import asset

from .clips import coverage, describe_clips
from .vocabulary import SHAPES, Combination

CROP = 24  # pixels a side that the CNN sees
_WINDOW = 2.4  # the crop's side over the square root of the object's area; every shape fits


class ShapeJudge(nn.Module):
    """Crops of a mask, centred and scaled to the object -> a score for each of SHAPES. About 20 k
    parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 24, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * (CROP // 4) ** 2, len(SHAPES)),
        )

    def forward(self, crops: Float[Tensor, "n 1 c c"]) -> Float[Tensor, "n k"]:
        return self.layers(crops)


def centroids(mask: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b 2"]:
    """The mask's centre of mass, (x, y) in pixels with a pixel's centre at +.5."""
    height, width = mask.shape[-2:]
    x = torch.arange(width, device=mask.device) + 0.5
    y = torch.arange(height, device=mask.device) + 0.5
    area = mask.sum((-2, -1)).clamp_min(1e-3)
    return (
        torch.stack([(mask.sum(-2) * x).sum(-1), (mask.sum(-1) * y).sum(-1)], -1) / area[..., None]
    )


def crop_objects(mask: Float[Tensor, "n h w"]) -> Float[Tensor, "n 1 c c"]:
    """A CROP x CROP view of each object, centred on its centre of mass and scaled by its area."""
    height, width = mask.shape[-2:]
    size = torch.tensor([width, height], device=mask.device, dtype=torch.float32)
    centre = centroids(mask) * 2 / size - 1
    half = 0.5 * _WINDOW * mask.sum((1, 2)).clamp_min(4.0).sqrt()
    theta = torch.zeros(len(mask), 2, 3, device=mask.device, dtype=torch.float32)
    theta[:, 0, 0], theta[:, 1, 1] = half * 2 / width, half * 2 / height
    theta[:, :, 2] = centre
    grid = F.affine_grid(theta, [len(mask), 1, CROP, CROP], align_corners=False)
    return F.grid_sample(mask[:, None], grid, align_corners=False)


def _blur(mask: Float[Tensor, "n h w"], sigma: float) -> Float[Tensor, "n h w"]:
    taps = torch.arange(-3.0, 4.0)
    kernel = torch.exp(-0.5 * (taps / max(sigma, 1e-3)) ** 2)
    kernel = kernel / kernel.sum()
    mask = F.conv2d(mask[:, None], kernel[None, None, :, None], padding=(3, 0))
    return F.conv2d(mask, kernel[None, None, None, :], padding=(0, 3))[:, 0]


def _training_batch(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Crops of clean drawings, some blurred or noisy as a decoder's output is, and their shapes."""
    shape = torch.randint(len(SHAPES), (count,), generator=generator)
    clips = describe_clips([Combination(s, 0, 0) for s in shape.tolist()], generator)
    side = int(torch.randint(48, 97, (), generator=generator))
    mask = coverage(clips, 1, side, side)[:, 0]
    mask = _blur(mask, 1.6 * torch.rand((), generator=generator, dtype=torch.float32).item())
    noise = torch.randn(mask.shape, generator=generator, dtype=torch.float32) * (mask > 0.05)
    mask = (mask + 0.12 * torch.rand((), generator=generator, dtype=torch.float32) * noise).clamp(
        0, 1
    )
    return crop_objects(mask), shape


def train_shape_judge(seed: int = 0, steps: int = 300, batch_size: int = 64) -> ShapeJudge:
    """Trains the CNN; a few seconds on a CPU core. The same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = ShapeJudge()
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        crops, shape = _training_batch(batch_size, generator)
        loss = F.cross_entropy(judge(crops), shape)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval().requires_grad_(False)


def save_shape_judge(judge: ShapeJudge, path: str | Path) -> None:
    """Writes the weights as safetensors (fp16)."""
    from safetensors.torch import save_file

    save_file(
        {key: value.half().contiguous() for key, value in judge.state_dict().items()}, str(path)
    )
    Path(path).chmod(0o644)  # safetensors writes files that only their owner can read


def load_shape_judge(path: str | Path | None = None) -> ShapeJudge:
    """The committed judge, or the one at `path`."""
    from safetensors.torch import load_file

    judge = ShapeJudge()
    judge.load_state_dict(
        {k: v.float() for k, v in load_file(str(path or asset("judge.safetensors"))).items()}
    )
    return judge.eval().requires_grad_(False)
