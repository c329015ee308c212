"""Trains the demo model from nothing: VAE, decoder, DiT on short clips, DiT on full clips, export."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.files import write_json
from dit_accel.sampling.devices import pick_device

from .checks import check_empty_dir
from .clips import ANYWHERE, Clips, draw_clips, render
from .config import (
    DECODER_FRAMES,
    HEIGHT,
    NUM_FRAMES,
    SHORT_FRAMES,
    STATISTICS_FRAMES,
    VAE_FRAMES,
    WIDTH,
    TrainConfig,
)
from .dit import CaptionTable, build_transformer, flow_matching_loss
from .loop import Stage, run_stage, running_average, step_generator
from .optimizers import muon_and_adamw, muon_for_all
from .text import build_text_encoder, build_tokenizer
from .vae import (
    POSTERIOR_STD,
    build_vae,
    decode_clip,
    encode_clip,
    finish_encoder,
    latent_scale,
    whole_clip,
)


def _clips_at(generator: torch.Generator, count: int, frames: int, device: torch.device) -> Tensor:
    clips = draw_clips(count, generator, placement=ANYWHERE)
    return render(clips, frames, HEIGHT, WIDTH).to(device)


def train_vae(
    config: TrainConfig, directory: Path, device: torch.device, progress: bool = True
) -> tuple[Any, float]:
    """The VAE stage. Returns the VAE, its latent statistics measured, and the seconds spent."""
    vae = build_vae(config.vae_base_dim, config.seed).to(device)
    optimizers = muon_for_all(vae, config.vae_learning_rate)

    def loss_of(generator: torch.Generator) -> Tensor:
        video = _clips_at(generator, config.vae_batch_size, VAE_FRAMES, device)
        mean = encode_clip(vae, video)
        noise = torch.randn(mean.shape, generator=generator).to(device)
        error = decode_clip(vae, mean + POSTERIOR_STD * noise) - video
        # The last term only keeps the latents from growing past unit size, where the noise would
        # not matter.
        excess = (mean.square().mean() - 1).clamp_min(0)
        return error.square().mean() + 0.3 * error.abs().mean() + 1e-3 * excess

    settings = {k: v for k, v in config.to_dict().items() if k.startswith("vae_") or k == "seed"}
    stage = Stage(
        "vae", config.vae_steps, settings, decay=0.6, seed=config.seed, save_every=config.save_every
    )
    with whole_clip(vae):
        seconds = run_stage(
            stage, directory / "vae", {"model": vae}, optimizers, loss_of, None, progress
        )
        generator = step_generator(config.seed, "latent statistics", 0)
        with torch.no_grad():
            latents = [
                encode_clip(vae, _clips_at(generator, 16, STATISTICS_FRAMES, device))
                for _ in range(8)
            ]
    finish_encoder(vae, torch.cat(latents))
    return vae, seconds


def tune_decoder(
    vae: Any, config: TrainConfig, directory: Path, device: torch.device, progress: bool = True
) -> float:
    """The decoder stage, in place: the encoder frozen, noisier latents than the VAE stage's.
    Returns seconds."""
    trained = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    optimizers = muon_for_all(trained, config.decoder_learning_rate)
    scale = latent_scale(vae, device)[1]

    def loss_of(generator: torch.Generator) -> Tensor:
        video = _clips_at(generator, config.vae_batch_size, DECODER_FRAMES, device)
        with torch.no_grad():
            mean = encode_clip(vae, video)
        noise = torch.randn(mean.shape, generator=generator)
        amount = 0.15 * torch.rand(len(mean), 1, 1, 1, 1, generator=generator)
        error = decode_clip(vae, mean + scale * (amount * noise).to(device)) - video
        return error.square().mean() + 0.2 * error.abs().mean()

    settings = {
        k: v
        for k, v in config.to_dict().items()
        if k.startswith(("vae_", "decoder_")) or k == "seed"
    }
    stage = Stage(
        "decoder",
        config.decoder_steps,
        settings,
        decay=0.7,
        seed=config.seed,
        save_every=config.save_every,
    )
    with whole_clip(vae):
        return run_stage(
            stage, directory / "decoder", {"model": trained}, optimizers, loss_of, None, progress
        )


@torch.no_grad()
def encode_pool(
    vae: Any, count: int, frames: int, seed: int, device: torch.device, progress: bool = True
) -> tuple[Tensor, Clips]:
    """Normalised latents of `count` training clips, and the clips. The same for the same arguments."""
    from tqdm import trange

    clips = draw_clips(count, step_generator(seed, f"pool of {frames} frames", 0))
    mean, std = latent_scale(vae, device)
    parts = []
    with whole_clip(vae), torch.autocast(device.type, torch.bfloat16):
        for i in trange(0, count, 32, desc=f"encoding {frames}-frame clips", disable=not progress):
            video = render(clips[i : i + 32], frames, HEIGHT, WIDTH).to(device)
            parts.append((encode_clip(vae, video).float() - mean) / std)
    return torch.cat(parts), clips


def train_dit(
    name: str,
    frames: int,
    model: Any,
    ema: Any,
    vae: Any,
    table: CaptionTable,
    config: TrainConfig,
    directory: Path,
    device: torch.device,
    progress: bool = True,
) -> float:
    """A DiT stage, in place: "short" or "full". Returns the seconds spent, encoding the pool
    included."""
    options = config.to_dict()
    rate = options[f"{name}_learning_rate"]
    matrices = [p for p in model.parameters() if p.ndim in (2, 5)]
    optimizers = muon_and_adamw(matrices, list(model.parameters()), 3 * rate, rate)

    @cache  # on the first step, so that a finished stage never encodes its pool
    def pool() -> tuple[Tensor, Tensor]:
        latents, clips = encode_pool(
            vae, options[f"{name}_pool"], frames, config.seed, device, progress
        )
        return latents, table.index(clips)

    def loss_of(generator: torch.Generator) -> Tensor:
        return flow_matching_loss(
            model, *pool(), table, config, options[f"{name}_batch_size"], generator
        )

    ignored = ("save_every", "full_") if name == "short" else ("save_every",)
    settings = {k: v for k, v in options.items() if not k.startswith(ignored)}
    stage = Stage(
        f"dit-{name}",
        options[f"{name}_steps"],
        settings,
        seed=config.seed,
        save_every=config.save_every,
    )
    return run_stage(
        stage,
        directory / f"dit-{name}",
        {"model": model, "ema": ema},
        optimizers,
        loss_of,
        running_average(ema, model, config.ema),
        progress,
    )


def train(
    output_dir: str | Path,
    work_dir: str | Path | None = None,
    config: TrainConfig | None = None,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Trains the demo model and writes it as a complete Wan2.1-format diffusers repository (fp16
    safetensors).

    Args:
        output_dir: where the repository goes; must not exist yet. It appears only when it is
            complete.
        work_dir: where checkpoints go (default: `<output_dir>-work`). Started again with the same
            `work_dir`, training resumes from the newest checkpoint and ends with the weights of an
            uninterrupted run.
        config: the recipe; its defaults take about 50 minutes on two CPU cores.
        device: "auto" (the GPU where there is one), "cpu", "cuda", ...
        progress: whether to show a bar for each stage on stderr.

    Returns:
        What is also written to `<work_dir>/training.json`: the recipe, seconds per stage, versions,
        machine.
    """
    from diffusers import UniPCMultistepScheduler, WanPipeline

    from .export import export_pipeline, training_record

    config = config or TrainConfig()
    output = check_empty_dir("output_dir", output_dir)
    work = Path(work_dir) if work_dir is not None else output.with_name(output.name + "-work")
    place = pick_device(device)
    work.mkdir(parents=True, exist_ok=True)

    seconds: dict[str, float] = {}
    vae, seconds["vae"] = train_vae(config, work, place, progress)
    seconds["decoder"] = tune_decoder(vae, config, work, place, progress)
    vae.eval().requires_grad_(False)

    tokenizer = build_tokenizer()
    text_encoder = build_text_encoder(len(tokenizer), config.seed)
    table = CaptionTable(text_encoder, tokenizer, place)
    model = build_transformer(config).to(place)
    ema = copy.deepcopy(model).requires_grad_(False)
    shared = (model, ema, vae, table, config, work, place, progress)
    seconds["dit-short"] = train_dit("short", SHORT_FRAMES, *shared)
    model.load_state_dict(ema.state_dict())  # the second stage starts from the first one's average
    seconds["dit-full"] = train_dit("full", NUM_FRAMES, *shared)

    record = training_record(config, seconds, place)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=config.shift,
    )
    parts = {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae, "transformer": ema}
    export_pipeline(output, WanPipeline, scheduler, parts)
    write_json(work / "training.json", record)
    return record
