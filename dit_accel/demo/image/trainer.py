"""Trains an image model from nothing: VAE, transformer, export."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dit_accel.files import write_json
from dit_accel.sampling.devices import pick_device

from ..checks import check_empty_dir
from ..clips import Clips
from ..config import ImageRecipe, ImageTrainConfig, Lumina2TrainConfig
from ..loop import Stage, run_stage, running_average, step_generator
from ..optimizers import muon_and_adamw, muon_for_all
from .dit import flow_matching_loss
from .lumina2 import LUMINA_IMAGE_2
from .model import Captions, StillModel
from .sd3 import STABLE_DIFFUSION_3
from .stills import ANYWHERE, draw_stills, render_stills
from .vae import encode, normalise

_MODELS: dict[type[ImageRecipe], StillModel] = {
    ImageTrainConfig: STABLE_DIFFUSION_3,
    Lumina2TrainConfig: LUMINA_IMAGE_2,
}

_LATENT_NOISE = 0.4  # the most that a training step adds to the latents, in their own units


def train_vae(
    still_model: StillModel,
    config: ImageRecipe,
    directory: Path,
    device: torch.device,
    progress: bool = True,
) -> tuple[Any, float]:
    """The VAE stage. Returns the VAE, its latents normalised, and the seconds spent."""
    vae, side = still_model.build_vae(config).to(device), still_model.side

    def loss_of(generator: torch.Generator) -> Tensor:
        images = render_stills(
            draw_stills(config.vae_batch_size, generator, placement=ANYWHERE), side, side
        ).to(device)
        amount = _LATENT_NOISE * torch.rand(
            len(images), 1, 1, 1, generator=generator, dtype=torch.float32
        )
        with torch.autocast(device.type, torch.bfloat16):
            mean = encode(vae, images).float()
            noise = amount * torch.randn(mean.shape, generator=generator, dtype=torch.float32)
            decoded = vae.decode(mean + noise.to(device)).sample.float()
        error = decoded - images
        # The last term only keeps the latents from growing past unit size, where the noise would
        # not matter.
        excess = (mean.square().mean() - 1).clamp_min(0)
        return error.square().mean() + 0.3 * error.abs().mean() + 1e-3 * excess

    stage = Stage(
        "vae",
        config.vae_steps,
        {k: v for k, v in config.to_dict().items() if k.startswith("vae_") or k == "seed"},
        decay=0.6,
        seed=config.seed,
        save_every=config.save_every,
    )
    seconds = run_stage(
        stage,
        directory / "vae",
        {"model": vae},
        muon_for_all(vae, config.vae_learning_rate),
        loss_of,
        None,
        progress,
    )
    normalise(vae, encode_pool(vae, side, 256, config.seed, device, progress)[0])
    return vae.eval().requires_grad_(False), seconds


@torch.no_grad()
def encode_pool(
    vae: Any, side: int, count: int, seed: int, device: torch.device, progress: bool = True
) -> tuple[Float[Tensor, "n z h w"], Clips]:
    """Latents of `count` training stills of `side` x `side` pixels, and the stills. The same for the same arguments."""
    from tqdm import trange

    stills = draw_stills(count, step_generator(seed, "pool of stills", 0))
    parts = []
    with torch.autocast(device.type, torch.bfloat16):
        for i in trange(0, count, 32, desc="encoding stills", disable=not progress):
            images = render_stills(stills[i : i + 32], side, side).to(device)
            parts.append(encode(vae, images).float())
    return torch.cat(parts), stills


def train_dit(
    still_model: StillModel,
    model: Any,
    ema: Any,
    pipeline: Any,
    config: ImageRecipe,
    directory: Path,
    device: torch.device,
    progress: bool = True,
) -> float:
    """The transformer's stage, in place; `pipeline` has the VAE and encodes the captions. Returns
    the seconds spent, encoding the pool included."""
    rate = config.dit_learning_rate
    matrices = [p for p in model.parameters() if p.ndim in (2, 4)]

    @cache  # on the first step, so that a finished stage never encodes its pool
    def pool() -> tuple[Tensor, Captions]:
        latents, stills = encode_pool(
            pipeline.vae, still_model.side, config.dit_pool, config.seed, device, progress
        )
        captions = stills.captions(with_motion=False)
        return latents, still_model.embed(pipeline, captions, device, config)

    def loss_of(generator: torch.Generator) -> Tensor:
        return flow_matching_loss(model, *pool(), config, generator)

    stage = Stage(
        "dit",
        config.dit_steps,
        {k: v for k, v in config.to_dict().items() if k != "save_every"},
        seed=config.seed,
        save_every=config.save_every,
    )
    return run_stage(
        stage,
        directory / "dit",
        {"model": model, "ema": ema},
        muon_and_adamw(matrices, list(model.parameters()), 3 * rate, rate),
        loss_of,
        running_average(ema, model, config.ema),
        progress,
    )


def train_image(
    output_dir: str | Path,
    work_dir: str | Path | None = None,
    config: ImageRecipe | None = None,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Train an image model and write it as a complete diffusers repository (fp16 safetensors).

    Args:
        output_dir: where the repository goes; must not exist yet. It appears only when it is
            complete.
        work_dir: where checkpoints go (default: `<output_dir>-work`). Started again with the same
            `work_dir`, training resumes from the newest checkpoint and ends with the weights of an
            uninterrupted run.
        config: the recipe, whose class decides the model: `ImageTrainConfig` (default) is Stable
            Diffusion 3, `Lumina2TrainConfig` is Lumina-Image 2.0.
        device: "auto" (the GPU where there is one), "cpu", "cuda", ...
        progress: whether to show a bar for each stage on stderr.

    Returns:
        What is also written to `<work_dir>/training.json`: the recipe, seconds per stage, versions,
        machine.
    """
    import diffusers

    from ..export import export_pipeline, training_record

    config = config or ImageTrainConfig()
    still_model = _MODELS[type(config)]
    output = check_empty_dir("output_dir", output_dir)
    work = Path(work_dir) if work_dir is not None else output.with_name(output.name + "-work")
    place = pick_device(device)
    work.mkdir(parents=True, exist_ok=True)

    seconds: dict[str, float] = {}
    vae, seconds["vae"] = train_vae(still_model, config, work, place, progress)
    model = still_model.build_transformer(config).to(place)
    ema = copy.deepcopy(model).requires_grad_(False)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=config.shift)
    parts = {"vae": vae, "transformer": ema, **still_model.build_text_parts(config.seed)}
    pipeline_class = getattr(diffusers, still_model.pipeline)
    pipeline = pipeline_class(scheduler=scheduler, **parts)
    pipeline.to(place)
    seconds["dit"] = train_dit(still_model, model, ema, pipeline, config, work, place, progress)

    record = training_record(config, seconds, place)
    export_pipeline(output, pipeline_class, scheduler, parts)
    write_json(work / "training.json", record)
    return record
