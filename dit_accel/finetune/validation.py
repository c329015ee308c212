"""`Validator`: clips or images of the sparse model beside those of the dense one, from the same seeds."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_accel.eval.metrics.pairs import psnr, ssim
from dit_accel.files import atomic_path, naming_failures, write_json
from dit_accel.finetune.guards import jsonable
from dit_accel.finetune.processes import Processes
from dit_accel.sampling import media
from dit_accel.sampling.acceleration import weights_sha256
from dit_accel.sampling.batches import quiet
from dit_accel.sampling.call import media_kind, run_batch
from dit_accel.sampling.plan import Sample, plan_samples
from dit_accel.sampling.prompt_sets import SETS, load_prompts
from dit_accel.sampling.prompts import SUFFIXES, PromptRecord, number_prompts
from dit_accel.sampling.settings import Sampling, with_steps

FOLDER, REFERENCE, RECORD = "validation", "dense", "metrics.json"
PSNR_OF_EQUAL = 100.0
"""PSNR that stands for equal pictures, whose PSNR is infinite, in means and curves."""
DEFAULT_FPS = 16.0


@dataclass(frozen=True)
class Made:
    """One sample as the pipeline made it."""

    pictures: UInt8[np.ndarray, "t h w 3"]
    latents: Tensor
    """Latents of the last step, `[C, (F,) H, W]`, fp32 on the CPU."""
    density: float | None
    """Realised density of sparse attention; None: dense."""


def validation_prompts(text: str) -> list[PromptRecord]:
    """Return the prompts of `--validation_prompts`: separated by ":::", a prompts file, or a shipped set.

    Raises:
        ValueError: a file that cannot be read, or an empty prompt.
    """
    if text in SETS or Path(text).suffix.lower() in SUFFIXES:
        return load_prompts(text)
    prompts = [x.strip() for x in text.split(":::")]
    if not all(prompts):
        raise ValueError(
            f"validation_prompts={text!r}: an empty prompt; accepted are texts separated by ':::', or a prompts file"
        )
    return number_prompts(prompts)


class CutShort(Exception):
    """A signal asked the run to end while samples were made."""


class Validator:
    """Samples the sparse model and compares with the dense one.

    The dense samples are made once, by the model as it was before training, and kept as files, so that a run that
    goes on compares with the same ones.

    Args:
        pipe: the pipeline that trains; dense until `make_references` was called.
        config: settings of the run (`FinetuneConfig`).
        folder: output folder of the run.
        size: frames, height and width in pixels; images have one frame.
        text_tokens: of a prompt, as in training.
        processes: the processes of the run, which share the samples.
        together: every process makes every sample, as a sharded transformer needs it.
        stopping: whether a signal asks the run to end; a validation is then cut short.

    Raises:
        ValueError: prompts or sizes that cannot be sampled.
    """

    def __init__(
        self,
        pipe: Any,
        config: Any,
        folder: Path,
        *,
        size: tuple[int, int, int],
        text_tokens: int,
        processes: Processes | None = None,
        together: bool = False,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.pipe, self.config = pipe, config
        self.folder = folder / FOLDER
        self.processes = processes or Processes()
        self.together, self.stopping = together, stopping
        self.fps = config.fps or DEFAULT_FPS
        self.samples = _samples(pipe, config, size, text_tokens)
        self._references: dict[str, Made] = {}

    def _own(self) -> Iterator[Sample]:
        """Yield the samples that this process makes.

        Raises:
            CutShort: a signal came to any process; in all of them.
        """
        share = 1 if self.together else self.processes.count
        own = self.samples if self.together else self.samples[self.processes.rank :: share]
        for i in range(-(-len(self.samples) // share)):
            # All processes ask equally often, also those that have a sample less.
            if self.processes.sum(torch.tensor(float(self.stopping()))) > 0:
                raise CutShort
            if i < len(own):
                yield own[i]

    @property
    def _writes(self) -> bool:
        return not self.together or self.processes.is_main

    def make_references(self) -> None:
        """Make the dense samples, or read those of an earlier run with the same settings.

        Call it before sparse attention is installed and before any weight changes.

        Raises:
            RuntimeError: a file could not be written.
            CutShort: a signal came.
        """
        folder = self.folder / REFERENCE
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"weights": weights_sha256(self.pipe), "config": self._settings()}
        record = folder / "settings.json"
        known = _read_json(record) == settings
        # All processes look before one of them writes.
        self.processes.barrier()
        for sample in self._own():
            path = folder / f"{sample.id}.safetensors"
            made = _read_made(path) if known else None
            if made is None:
                made = self._make(sample)
                if self._writes:
                    with naming_failures():
                        self._write_pictures(folder / sample.id, made.pictures)
                        _write_made(path, made)
            self._references[sample.id] = made
        self.processes.barrier()
        if self.processes.is_main:
            write_json(record, settings)

    def _settings(self) -> list[Any]:
        return [[x.id, x.record.prompt, x.seed, x.sampling.call_arguments()] for x in self.samples]

    def run(self, name: str) -> dict[str, float]:
        """Make the sparse samples, write them beside the dense ones, and return the mean metrics.

        Args:
            name: of the folder of this validation, such as "distillation-000500".

        Returns:
            `psnr` (dB), `ssim`, `latent_error` (relative) and `density`, as means over all samples. The density is
            left out if nothing ran sparse.

        Raises:
            RuntimeError: a file could not be written, or the model returned values that are not finite.
            CutShort: a signal came.
        """
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        rows = {}
        for sample in self._own():
            dense, sparse = self._references[sample.id], self._make(sample)
            rows[sample.id] = compared(dense, sparse)
            if self._writes:
                both = media.side_by_side(
                    [("dense", dense.pictures), (_title(sparse), sparse.pictures)]
                )
                with naming_failures():
                    self._write_pictures(folder / f"{sample.id}-sparse", sparse.pictures)
                    self._write_pictures(folder / f"{sample.id}-side_by_side", both)
        found = self.processes.gather(rows)
        rows = {key: row for part in found for key, row in part.items()}
        means = {
            key: float(np.mean([row[key] for row in rows.values() if key in row]))
            for key in ("psnr", "ssim", "latent_error", "density")
            if any(key in row for row in rows.values())
        }
        if self.processes.is_main:
            with naming_failures():
                record = {"format_version": 1, "mean": means, "samples": rows}
                write_json(folder / RECORD, jsonable(record))
        return means

    def _make(self, sample: Sample) -> Made:
        watched = _Watched(self.pipe, lambda: not self.together and self.stopping())
        training = self.pipe.transformer.training
        self.pipe.transformer.eval()
        try:
            with quiet(self.pipe):
                result = run_batch(watched, [sample])
        finally:
            self.pipe.transformer.train(training)
        density = result.summary.density if result.summary.enabled else None
        return Made(result.pictures(0), watched.latents[0].detach().float().cpu(), density)

    def _write_pictures(self, stem: Path, pictures: UInt8[np.ndarray, "t h w 3"]) -> None:
        kind = "png" if len(pictures) == 1 else "mp4"
        media.write_clip(stem, pictures, kind=kind, fps=self.fps)


class _Watched:
    """A pipeline whose calls note their last latents, and end early when asked to."""

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
            pipe._interrupt = True  # it then leaves out its remaining steps
        return {}


def _samples(pipe: Any, config: Any, size: tuple[int, int, int], text_tokens: int) -> list[Sample]:
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


def compared(dense: Made, sparse: Made) -> dict[str, float]:
    """Return PSNR, SSIM and relative latent error of a sample, and its density where it ran sparse."""
    values = {
        "psnr": min(PSNR_OF_EQUAL, psnr(dense.pictures, sparse.pictures)),
        "ssim": ssim(dense.pictures, sparse.pictures),
        "latent_error": float((sparse.latents - dense.latents).norm() / dense.latents.norm()),
    }
    return values if sparse.density is None else values | {"density": sparse.density}


def _title(sparse: Made) -> str:
    return (
        "dense (nothing ran sparse)" if sparse.density is None else f"sparse, {sparse.density:.2f}"
    )


def _write_made(path: Path, made: Made) -> None:
    tensors = {
        "pictures": torch.from_numpy(np.ascontiguousarray(made.pictures)),
        "latents": made.latents.contiguous(),
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def _read_made(path: Path) -> Made | None:
    """Return a stored sample; None if it is not there or cannot be read."""
    try:
        tensors = load_file(path)
        return Made(tensors["pictures"].numpy(), tensors["latents"], None)
    except Exception:  # safetensors has an error class of its own; a sample is simply made again
        return None


def _read_json(path: Path) -> Any:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None
