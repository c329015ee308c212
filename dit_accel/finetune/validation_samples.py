"""Plan, make, compare and store the samples of a validation."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_accel.eval.metrics.pairs import psnr, ssim
from dit_accel.files import atomic_path
from dit_accel.finetune.shards import disk_errors
from dit_accel.sampling.batches import quiet
from dit_accel.sampling.call import media_kind, run_batch
from dit_accel.sampling.plan import Sample, plan_samples
from dit_accel.sampling.prompt_sets import SETS, load_prompts
from dit_accel.sampling.prompts import SUFFIXES, PromptRecord, number_prompts
from dit_accel.sampling.settings import Sampling, with_steps

PSNR_OF_EQUAL = 100.0
"""PSNR of identical pictures. The real value is infinite, which means and curves cannot use."""


@dataclass(frozen=True)
class Made:
    """Output of the pipeline for one sample."""

    pictures: UInt8[np.ndarray, "t h w 3"]
    """Frames of the clip. Images have one frame."""
    latents: Tensor
    """Latents of the last step, `[C, (F,) H, W]`, in fp32 on the CPU."""
    density: float | None
    """Realised density of sparse attention; None if the sample is dense."""


def validation_prompts(text: str) -> list[PromptRecord]:
    """Return the prompts of the option `validation_prompts`.

    Args:
        text: prompts separated by ":::", the path of a prompts file, or the name of a shipped prompt set.

    Raises:
        ValueError: if a file cannot be read, or if a prompt is empty.
    """
    if text in SETS or Path(text).suffix.lower() in SUFFIXES:
        return load_prompts(text)
    prompts = [x.strip() for x in text.split(":::")]
    if not all(prompts):
        raise ValueError(
            f"validation_prompts={text!r}: a prompt is empty; expected texts separated by ':::', or a prompts file"
        )
    return number_prompts(prompts)


def validation_samples(
    pipe: Any, config: Any, size: tuple[int, int, int], text_tokens: int
) -> list[Sample]:
    """Return the validation samples to make.

    Args:
        pipe: the pipeline that will make the samples.
        config: settings of the run (`FinetuneConfig`).
        size: frames, height and width in pixels. Images have one frame.
        text_tokens: number of text tokens of a prompt.

    Raises:
        ValueError: if a prompt or size cannot be sampled.
    """
    frames, height, width = size
    guidance = config.validation_guidance_scale
    if guidance is None and config.targets == "guided":
        guidance = 1.0
    sampling = Sampling(
        height=height,
        width=width,
        num_frames=frames if media_kind(pipe) == "clips" else None,
        num_inference_steps=config.validation_num_inference_steps,
        guidance_scale=guidance,
        max_sequence_length=text_tokens,
    )
    samples = plan_samples(
        validation_prompts(config.validation_prompts),
        with_steps(pipe, sampling),
        seed=config.seed,
        count=config.num_validation_videos,
        layout="ids",
    )
    for sample in samples:
        pipe.check_sizes(**sample.sampling.call_arguments())
    return samples


def make_sample(pipe: Any, sample: Sample, stopping: Callable[[], bool] = lambda: False) -> Made:
    """Make one sample with the current state of the pipeline.

    Args:
        pipe: a pipeline, dense or sparse.
        sample: the sample to make.
        stopping: function called after each step. If it returns True, the call stops early, and its result must not
            be used.

    Raises:
        RuntimeError: if the model returned non-finite values, or if the memory does not suffice.
    """
    watched = _Watched(pipe, stopping)
    training = pipe.transformer.training
    pipe.transformer.eval()
    try:
        with quiet(pipe):
            result = run_batch(watched, [sample])
    finally:
        pipe.transformer.train(training)
    density = result.summary.density if result.summary.enabled else None
    return Made(result.pictures(0), watched.latents[0].detach().float().cpu(), density)


class _Watched:
    """Wrapper of a pipeline that records the last latents of a call, and can stop the call early."""

    def __init__(self, pipe: Any, stopping: Callable[[], bool]) -> None:
        self._pipe, self._stopping = pipe, stopping
        self.latents: Tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    def __call__(self, **arguments: Any) -> Any:
        return self._pipe(callback_on_step_end=self._note, **arguments)

    def _note(self, pipe: Any, _step: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.latents = tensors["latents"]
        if self._stopping():
            pipe._interrupt = True  # diffusers then skips the remaining steps
        return {}


def compared(dense: Made, sparse: Made) -> dict[str, float]:
    """Return PSNR, SSIM and relative latent error of a sparse sample, and its density if a layer ran sparse."""
    values = {
        "psnr": min(PSNR_OF_EQUAL, psnr(dense.pictures, sparse.pictures)),
        "ssim": ssim(dense.pictures, sparse.pictures),
        "latent_error": float((sparse.latents - dense.latents).norm() / dense.latents.norm()),
    }
    return values if sparse.density is None else values | {"density": sparse.density}


def write_made(path: Path, made: Made) -> None:
    """Write a sample to a file atomically.

    Raises:
        OSError: if the file could not be written.
    """
    tensors = {
        "pictures": torch.from_numpy(np.ascontiguousarray(made.pictures)),
        "latents": made.latents.contiguous(),
    }
    with atomic_path(path) as temporary, disk_errors(temporary):
        save_file(tensors, temporary)


def read_made(path: Path) -> Made | None:
    """Return a stored sample, or None if the file is missing or cannot be read."""
    try:
        tensors = load_file(path)
        return Made(tensors["pictures"].numpy(), tensors["latents"], None)
    except Exception:  # any unreadable file: the sample is made again
        return None
