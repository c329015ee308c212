"""Training of the shipped feature extractor (eval/train_extractor.py)."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from dit_accel.demo.clips import RADIUS, STILL_ANYWHERE, centres, coverage, draw_clips
from dit_accel.demo.tiny_extractor import ASSET, FEATURES, SIZE, TinyExtractor
from dit_accel.demo.vocabulary import BACKGROUND_RGB, COLOUR_RGB
from dit_accel.files import atomic_path

SHAPES = 4
MEASURES = 11  # object RGB, background RGB, centre, radius, blur, noise
MOST_BLUR = 2.5  # standard deviation in pixels
MOST_NOISE = 0.2  # standard deviation of values in [0, 1]
FLOOR = 0.3  # share of the mean variance that is added to each direction's


def drawing_batch(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return drawings, their shapes, and measures of them that are scaled to about unit size.

    Half of the colours are random, the others are near the vocabulary's. 60 % are blurred, 60 % are noisy.
    """

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
    # The network learns square roots of blur and noise, drawn evenly, because small amounts matter most.
    blur, noise = (uniform(count) * (uniform(count) < 0.6) for _ in range(2))
    images = blurred_pictures(images, MOST_BLUR * blur.square())
    grain = torch.randn(images.shape, generator=generator, dtype=torch.float32)
    images = (images + (MOST_NOISE * noise.square())[:, None, None, None] * grain).clamp(0, 1)
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


def blurred_pictures(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each picture with its own Gaussian, which is cut off and renormalised at the borders."""
    place = torch.arange(SIZE)
    kernel = torch.exp(
        -0.5 * ((place[:, None] - place) / sigma.clamp_min(1e-3)[:, None, None]) ** 2
    )
    kernel = (kernel / kernel.sum(2, keepdim=True))[:, None]  # [n, 1, s, s]
    return kernel @ images @ kernel.mT


def train_extractor(
    seed: int = 0, steps: int = 3000, batch_size: int = 64, progress: bool = True
) -> TinyExtractor:
    """Train the network, in about three minutes on a CPU core. Equal arguments give equal weights.

    The features are uncorrelated over the training pictures, and the largest have unit variance.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        extractor = TinyExtractor()
        heads = nn.Linear(FEATURES, SHAPES + MEASURES)
    optimizer = torch.optim.AdamW([*extractor.parameters(), *heads.parameters()], 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    with trange(steps, desc="training", disable=not progress, mininterval=2.0) as bar:
        for _ in bar:
            images, shape, measures = drawing_batch(batch_size, generator)
            told = heads(extractor(images))
            naming = F.cross_entropy(told[:, :SHAPES], shape)
            measuring = (told[:, SHAPES:] - measures).square().mean()
            loss = naming + 4 * measuring
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(naming=f"{naming:.3f}", measuring=f"{measuring:.4f}", refresh=False)
    whiten(extractor, [drawing_batch(256, generator)[0] for _ in range(8)])
    return extractor.eval().requires_grad_(False)


@torch.no_grad()
def whiten(extractor: TinyExtractor, batches: list[Tensor]) -> None:
    """Decorrelate and scale the features, by changing the last layer.

    Otherwise the shape would dominate every distance, because its logits grow without bound in training.
    Directions of little variance stay small, because they would be noise at unit variance.
    """
    features = torch.cat([extractor(images) for images in batches]).double()
    values, vectors = torch.linalg.eigh(torch.cov(features.mT))
    scale = (values + FLOOR * values.mean()).rsqrt()
    turn = scale[:, None] * vectors.mT
    last = extractor.layers[-1]
    assert isinstance(last, nn.Linear)
    bias = turn @ (last.bias.double() - features.mean(0))
    last.weight.copy_(turn @ last.weight.double())
    last.bias.copy_(bias)


def save_half(module: nn.Module, path: str | os.PathLike) -> None:
    """Write the weights as safetensors in fp16, atomically."""
    with atomic_path(path) as temporary:
        save_file({k: v.half().contiguous() for k, v in module.state_dict().items()}, temporary)


@dataclass
class ExtractorTraining:
    """Training of the extractor, with the weights written as safetensors in fp16."""

    output: Path = Path("assets") / ASSET
    """File to write."""
    seed: int = 0
    """Seed of the drawings and the initial weights."""
    steps: int = 3000
    """Number of optimiser steps."""
    batch_size: int = 64
    """Number of drawings in a step."""
    threads: int = 1
    """Threads of torch."""

    def run(self) -> None:
        """Train, write the weights, and print the size of the file and the time."""
        torch.set_num_threads(self.threads)
        began, busy = time.perf_counter(), time.process_time()
        save_half(train_extractor(self.seed, self.steps, self.batch_size), self.output)
        seconds = f"{time.perf_counter() - began:.0f} s, {time.process_time() - busy:.0f} s of CPU"
        print(f"{self.output}: {self.output.stat().st_size} bytes, {seconds}")
