"""The shipped feature network: what the demo's pictures show and how well, in 64 numbers.

It is trained from nothing on the demo's drawings to name shape, colours, place and size, and to
measure blur and noise. The judge's own CNN would not do: it sees one normalised mask of the object, so
a wrong colour, background, place or texture would not move its features at all.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 64
"""Pixels a side that it sees."""
FEATURES = 64
ASSET = "tiny-extractor.safetensors"

_SHAPES = 4
_MEASURES = 11  # object RGB, background RGB, centre, radius, blur, noise
_MOST_BLUR = 2.5  # standard deviation in pixels
_MOST_NOISE = 0.2  # standard deviation of values in [0, 1]
_FLOOR = 0.3  # of the mean variance: directions of less stay smaller than the others


class TinyExtractor(nn.Module):
    """Pictures with values in [0, 1] -> features. About 115 k parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(48, 64, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(64 * (SIZE // 16) ** 2, FEATURES),
        )

    def forward(self, images: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n d"]:
        return self.layers(2 * images - 1)


def training_batch(
    count: int, generator: torch.Generator
) -> tuple[Float[Tensor, "n 3 s s"], Int[Tensor, " n"], Float[Tensor, "n m"]]:
    """Drawings, their shapes, and what else is asked about them, each measure of unit size.

    Half of the colours are any, the rest near the vocabulary's; 60 % are blurred, 60 % are noisy.
    """
    from dit_accel.demo.clips import RADIUS, STILL_ANYWHERE, centres, coverage, draw_clips
    from dit_accel.demo.vocabulary import BACKGROUND_RGB, COLOUR_RGB

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float32)

    def colours(palette: tuple[tuple[float, ...], ...], chosen: Tensor) -> Tensor:
        near = torch.tensor(palette, dtype=torch.float32)[chosen] + 0.1 * (uniform(count, 3) - 0.5)
        return torch.where(uniform(count, 1) < 0.5, near.clamp(0, 1), uniform(count, 3))

    stills = draw_clips(count, generator, split="all", placement=STILL_ANYWHERE)
    mask = coverage(stills, 1, SIZE, SIZE)  # [n, 1, s, s]
    colour = colours(COLOUR_RGB, stills.colour)
    background = colours(BACKGROUND_RGB, stills.background)
    images = torch.lerp(background[:, :, None, None], colour[:, :, None, None], mask)
    # The square roots are asked for and drawn evenly: a little blur or noise is what matters most.
    blur, noise = (uniform(count) * (uniform(count) < 0.6) for _ in range(2))
    images = _blurred(images, _MOST_BLUR * blur.square())
    grain = torch.randn(images.shape, generator=generator, dtype=torch.float32)
    images = (images + (_MOST_NOISE * noise.square())[:, None, None, None] * grain).clamp(0, 1)
    measures = torch.cat(
        [
            2 * colour - 1,
            2 * background - 1,
            centres(stills, 1, SIZE, SIZE)[:, 0] * 4 / SIZE - 2,
            (RADIUS * stills.size * 20 - 4)[:, None],
            3 * blur[:, None] - 1,
            3 * noise[:, None] - 1,
        ],
        1,
    )
    return images, stills.shape, measures


def _blurred(
    images: Float[Tensor, "n 3 s s"], sigma: Float[Tensor, " n"]
) -> Float[Tensor, "n 3 s s"]:
    """Each picture under its own Gaussian, cut off at the borders."""
    place = torch.arange(SIZE)
    kernel = torch.exp(
        -0.5 * ((place[:, None] - place) / sigma.clamp_min(1e-3)[:, None, None]) ** 2
    )
    kernel = (kernel / kernel.sum(2, keepdim=True))[:, None]  # [n, 1, s, s]
    return kernel @ images @ kernel.mT


def train_tiny_extractor(
    seed: int = 0, steps: int = 3000, batch_size: int = 64, progress: bool = True
) -> TinyExtractor:
    """Trains the network; about three minutes on a CPU core. The same for the same arguments.

    The features come out uncorrelated over the training pictures, the main ones of unit size.
    """
    from tqdm import trange

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        extractor = TinyExtractor()
        heads = nn.Linear(FEATURES, _SHAPES + _MEASURES)
    optimizer = torch.optim.AdamW([*extractor.parameters(), *heads.parameters()], 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    with trange(steps, desc="training", disable=not progress, mininterval=2.0) as bar:
        for _ in bar:
            images, shape, measures = training_batch(batch_size, generator)
            told = heads(extractor(images))
            naming = F.cross_entropy(told[:, :_SHAPES], shape)
            measuring = (told[:, _SHAPES:] - measures).square().mean()
            loss = naming + 4 * measuring
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(naming=f"{naming:.3f}", measuring=f"{measuring:.4f}", refresh=False)
    _whiten(extractor, [training_batch(256, generator)[0] for _ in range(8)])
    return extractor.eval().requires_grad_(False)


@torch.no_grad()
def _whiten(extractor: TinyExtractor, batches: list[Tensor]) -> None:
    """Puts a rotation and a scale for each direction into the last layer, exactly.

    Else the shape, whose score grows without end in training, would be most of any distance. Directions
    that hardly vary stay small: stretched to unit size they would be noise.
    """
    features = torch.cat([extractor(images) for images in batches]).double()
    values, vectors = torch.linalg.eigh(torch.cov(features.mT))
    scale = (values + _FLOOR * values.mean()).rsqrt()
    turn = scale[:, None] * vectors.mT
    last = extractor.layers[-1]
    assert isinstance(last, nn.Linear)
    bias = turn @ (last.bias.double() - features.mean(0))
    last.weight.copy_(turn @ last.weight.double())
    last.bias.copy_(bias)


def save_tiny_extractor(extractor: TinyExtractor, path: str | os.PathLike) -> None:
    """Writes the weights as safetensors (fp16), atomically."""
    from safetensors.torch import save_file

    from dit_accel.files import atomic_path

    with atomic_path(path) as temporary:
        save_file({k: v.half().contiguous() for k, v in extractor.state_dict().items()}, temporary)


def tiny_extractor_path() -> Path:
    """The committed weights."""
    from dit_accel.files import asset

    return asset(ASSET)
