"""Training stages of the embedded models: autoencoder, decoder, transformer.

Each model has the tokenizers, text encoders and configurations of the embedded model of its kind. Text encoders have
one layer of random weights and are never trained, so each word has almost the same embedding in all sentences.
That is why transformers understand combinations of words that training never showed.
"""

import copy
from abc import ABC, abstractmethod
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dit_accel.files import asset

from . import clips
from .clips import FP32
from .config import Recipe
from .loop import Stage, run_stage, step_generator
from .vae import POSTERIOR_STD, normalise


class Trainer(ABC):
    """Trainer of one kind of model. The defaults of the class are those of stills.

    Args:
        config: recipe.
        device: device to train on.
        work: folder of the checkpoints.
        progress: show a bar for each stage on stderr.
    """

    name: ClassVar[str]
    """Name of the embedded model."""
    still = True
    """Whether the model makes stills instead of clips."""
    central, anywhere = clips.STILL, clips.STILL_ANYWHERE
    """Placement of the objects for the transformer, and for the autoencoder."""
    statistics: ClassVar[tuple[int, int, clips.Placement]] = (256, 1, clips.STILL)
    """Number, frames and placement of the samples that latents are normalised with."""
    side = 64
    """Height and width of samples in pixels."""
    stages: ClassVar[dict[str, int]] = {"dit": 1}
    """Number of frames in each training stage of the transformer, by the prefix of the stage's settings."""
    lengths: tuple[int, ...]
    """Padded lengths of the text in training: a short one, and the default of the pipeline."""

    def __init__(
        self, config: Recipe, device: torch.device, work: Path, progress: bool = True
    ) -> None:
        import diffusers

        self.config = asdict(config)
        self.device, self.work, self.progress = device, work, progress
        self.pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(asset(self.name))
        old = self.pipeline.scheduler
        shift = {x: config.shift for x in ("shift", "flow_shift") if x in old.config}
        self.vae, transformer = self.initial_vae(), self.initial_transformer()
        scheduler = type(old).from_config(old.config, **shift)
        self.pipeline.register_modules(vae=self.vae, transformer=transformer, scheduler=scheduler)
        self.pipeline.to(device)
        self.seconds: dict[str, float] = {}  # spent in each stage

    def new_part(self, part: str, **changes: Any) -> Any:
        """Return the "vae" or "transformer" of the embedded model with new random weights and changed settings."""
        embedded = getattr(self.pipeline, part)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config["seed"])
            return type(embedded).from_config({**embedded.config, **changes})

    @abstractmethod
    def initial_vae(self) -> Any:
        """Return the autoencoder with its initial weights."""

    @abstractmethod
    def initial_transformer(self) -> Any:
        """Return the transformer with its initial weights."""

    @torch.no_grad()
    def embed(self, captions: list[str]) -> None:
        """Encode the captions of a pool once, for `text`."""
        distinct = list(dict.fromkeys(captions))
        position = {text: i for i, text in enumerate(distinct)}
        self.rows = torch.tensor([position[text] for text in captions])
        self.tables = {length: self.encode(distinct, length) for length in self.lengths}

    @abstractmethod
    def encode(self, captions: list[str], length: int) -> list[Tensor]:
        """Return what the pipeline passes to the transformer for each caption, and at last for the empty one.

        `length` is the padded length of the text (`max_sequence_length`).
        """

    def text(self, rows: Tensor, empty: Tensor, length: int) -> list[Tensor]:
        """Return arguments of the transformer for captions at `rows` of the pool, or the empty one where `empty`."""
        table = self.tables[length]
        chosen = torch.where(empty, len(table[0]) - 1, self.rows[rows]).to(table[0].device)
        return [values[chosen] for values in table]

    @abstractmethod
    def velocity(self, noisy: Tensor, sigma: Float[Tensor, " n"], text: list[Tensor]) -> Tensor:
        """Call the transformer as the pipeline does, and return noise minus clean latents.

        `noisy` are latents with noise, `sigma` its levels in [0, 1], and `text` comes from the method `text`.
        """

    def run(self) -> None:
        """Run all stages. At the end the pipeline has the averaged weights of the transformer."""
        self.train_vae()
        if not self.still:
            self.train_decoder()
        self.vae.eval().requires_grad_(False)
        transformer = self.pipeline.transformer
        averaged = copy.deepcopy(transformer).requires_grad_(False)
        for prefix, frames in self.stages.items():
            # Each stage starts from the average of the stage before.
            transformer.load_state_dict(averaged.state_dict())
            self.train_transformer(prefix, frames, averaged)
        self.pipeline.register_modules(transformer=averaged)

    def train_vae(self) -> None:
        """Train the autoencoder, and normalise its latents."""

        def loss_of(generator: torch.Generator) -> Tensor:
            frames, noise = (1, 0.4) if self.still else (5, None)
            mean, error = self._reconstruct(frames, noise, generator)
            # The last term keeps the latents from growing past unit size, where noise would not matter.
            excess = (mean.square().mean() - 1).clamp_min(0)
            return error.square().mean() + 0.3 * error.abs().mean() + 1e-3 * excess

        self._run(Stage("vae", "vae", ("vae_", "seed"), decay=0.6), self.vae, loss_of)
        normalise(self.vae, self.encode_pool(*self.statistics)[0])

    def train_decoder(self) -> None:
        """Train the decoder on noisy latents of the frozen encoder."""

        def loss_of(generator: torch.Generator) -> Tensor:
            _, error = self._reconstruct(9, 0.15, generator, frozen=True)
            return error.square().mean() + 0.2 * error.abs().mean()

        parts = {"decoder": self.vae.decoder, "post_quant_conv": self.vae.post_quant_conv}
        stage = Stage("decoder", "decoder", ("vae_", "decoder_", "seed"), decay=0.7)
        self._run(stage, nn.ModuleDict(parts), loss_of)

    def train_transformer(self, prefix: str, frames: int, averaged: nn.Module) -> None:
        """Train the transformer on latents of a pool of samples, in the stage whose settings begin with `prefix`.

        `averaged` is the average of its weights, updated in place.
        """

        @cache  # in the first step, so that a finished stage never encodes its pool
        def pool() -> Tensor:
            count = self.config[f"{prefix}_pool"]
            latents, captions = self.encode_pool(count, frames, self.central)
            self.embed(captions)
            return latents

        def loss_of(generator: torch.Generator) -> Tensor:
            return self.flow_matching_loss(pool(), self.config[f"{prefix}_batch_size"], generator)

        name = prefix if self.still else f"dit-{prefix}"
        stage = Stage(name, prefix, muon=3.0)
        self._run(stage, self.pipeline.transformer, loss_of, averaged)

    def _run(self, stage: Stage, module: nn.Module, loss_of: Any, averaged: Any = None) -> None:
        """Run a stage, and note its seconds. The arguments are those of `run_stage`."""
        folder, shown = self.work / stage.name, self.progress
        seconds = run_stage(stage, self.config, folder, module, loss_of, averaged, shown)
        self.seconds[stage.name] = seconds

    def _reconstruct(
        self, frames: int, noise: float | None, generator: torch.Generator, frozen: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return latents of random samples, and the error of the pixels decoded from noisy latents.

        Args:
            frames: frames per sample.
            noise: largest standard deviation of the noise on the latents, which differs from sample to sample.
                None: the constant standard deviation of the posterior.
            generator: CPU generator of samples and noise.
            frozen: do not train the encoder.
        """
        samples = clips.draw_clips(self.config["vae_batch_size"], generator, "train", self.anywhere)
        pixels = self._render(samples, frames)
        std: Tensor | float = POSTERIOR_STD
        if noise is not None:
            shape = (len(samples), *[1] * (pixels.ndim - 1))
            std = noise * torch.rand(shape, generator=generator, dtype=FP32)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.still):
            with torch.set_grad_enabled(not frozen):
                mean = self.vae.encode(pixels).latent_dist.mean.float()
            added = std * torch.randn(mean.shape, generator=generator, dtype=FP32)
            decoded = self.vae.decode(mean + added.to(self.device)).sample.float()
        return mean, decoded - pixels

    @torch.no_grad()
    def encode_pool(
        self, count: int, frames: int, placement: clips.Placement
    ) -> tuple[Tensor, list[str]]:
        """Return latents and captions of `count` training samples. Equal arguments give equal samples."""
        from tqdm import trange

        name = "pool of stills" if self.still else f"pool of {frames} frames"
        generator = step_generator(self.config["seed"], name, 0)
        samples = clips.draw_clips(count, generator, "train", placement)
        parts = []
        with torch.autocast(self.device.type, torch.bfloat16):
            for i in trange(0, count, 32, desc="encoding samples", disable=not self.progress):
                pixels = self._render(samples[i : i + 32], frames)
                parts.append(self.vae.encode(pixels).latent_dist.mean.float())
        return torch.cat(parts), samples.captions(with_motion=not self.still)

    def flow_matching_loss(self, latents: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Return the mean squared error of the velocity on `count` random latents of the pool."""
        device, shift = self.device, self.config["shift"]
        rows = torch.randint(len(latents), (count,), generator=generator)
        noise = torch.randn(count, *latents.shape[1:], generator=generator, dtype=FP32).to(device)
        level = torch.sigmoid(1.1 * torch.randn(count, generator=generator, dtype=FP32))
        dropped = torch.rand(count, generator=generator, dtype=FP32)
        empty, length = dropped < self.config["caption_dropout"], self.lengths[0]
        if len(self.lengths) > 1:
            drawn = torch.rand((), generator=generator, dtype=FP32).item()
            length = self.lengths[drawn < self.config["long_text_share"]]
        text = self.text(rows, empty, length)

        sigma = (shift * level / (1 + (shift - 1) * level)).to(device)
        mix, clean = sigma.view(-1, *[1] * (latents.ndim - 1)), latents[rows.to(device)]
        with torch.autocast(device.type, torch.bfloat16):
            velocity = self.velocity((1 - mix) * clean + mix * noise, sigma, text)
        return (velocity.float() - (noise - clean)).square().mean()

    def _render(self, samples: clips.Clips, num_frames: int) -> Tensor:
        """Draw clips `[n, 3, t, h, w]`, or stills `[n, 3, h, w]`, with values in [-1, 1]."""
        pixels = clips.render(samples, num_frames, self.side, self.side).to(self.device)
        return pixels[:, :, 0] if self.still else pixels
