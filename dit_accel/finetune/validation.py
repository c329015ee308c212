"""`Validator`: compare samples of the sparse model with samples of the dense model from the same seeds."""

import contextlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from dit_accel.files import naming_failures, write_json
from dit_accel.finetune.guards import jsonable
from dit_accel.finetune.processes import Processes
from dit_accel.finetune.stop import CutShort
from dit_accel.finetune.validation_samples import (
    Made,
    compared,
    make_sample,
    read_made,
    validation_samples,
    write_made,
)
from dit_accel.sampling import media
from dit_accel.sampling.acceleration import weights_sha256
from dit_accel.sampling.plan import Sample

FOLDER, REFERENCE, RECORD = "validation", "dense", "metrics.json"
DEFAULT_FPS = 16.0


class Validator:
    """Sample the sparse model during training, and compare with samples of the dense model.

    The dense samples are made once, before training, and stored as files. A resumed run uses the stored samples.

    Args:
        pipe: the pipeline to train. It must be dense until `make_references` has been called.
        config: settings of the run (`FinetuneConfig`).
        folder: output folder of the run.
        size: frames, height and width in pixels. Images have one frame.
        text_tokens: number of text tokens of a prompt, as in training.
        processes: processes of the run, which share the samples. Default: a single process.
        together: every process makes every sample, as a sharded transformer requires.
        stopping: function that returns True if a signal was received. The validation then stops early.

    Raises:
        ValueError: if a prompt or size cannot be sampled.
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
        self.samples = validation_samples(pipe, config, size, text_tokens)
        self.sheet: np.ndarray | None = None
        """Frames of the first sample of the last validation, dense above sparse, as a uint8 array `[H, W, 3]`."""
        self._references: dict[str, Made] = {}

    def _each(self, action: Callable[[Sample], None]) -> None:
        """Run an action for each sample of this process.

        Raises:
            CutShort: in every process, if any process received a signal.
            OSError, ValueError, RuntimeError: in every process, if the action failed in any process.
        """
        share = 1 if self.together else self.processes.count
        own = self.samples if self.together else self.samples[self.processes.rank :: share]
        for i in range(-(-len(self.samples) // share)):
            # Collective call: processes with one sample less take part too.
            if self.processes.sum(torch.tensor(float(self.stopping()))) > 0:
                raise CutShort
            self.processes.together(partial(_run_all, action, own[i : i + 1]))

    @property
    def _writes(self) -> bool:
        return not self.together or self.processes.is_main

    def make_references(self) -> None:
        """Make the dense samples, or read the samples of an earlier run with the same settings.

        Call this method before sparse attention is installed and before any weight changes.

        Raises:
            RuntimeError: if a file could not be written.
            CutShort: if a signal was received.
        """
        folder = self.folder / REFERENCE
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"weights": weights_sha256(self.pipe), "config": self._settings()}
        record = folder / "settings.json"
        known = _read_json(record) == settings
        # All processes must read the record before the main process overwrites it.
        self.processes.barrier()

        def reference(sample: Sample) -> None:
            path = folder / f"{sample.id}.safetensors"
            made = read_made(path) if known else None
            if made is None:
                made = self._make(sample)
                if self._writes:
                    with naming_failures():
                        self._write_pictures(folder / sample.id, made.pictures)
                        write_made(path, made)
            self._references[sample.id] = made

        self._each(reference)
        with naming_failures():
            self.processes.main_only(lambda: write_json(record, settings))

    def _settings(self) -> list[Any]:
        return [[x.id, x.record.prompt, x.seed, x.sampling.call_arguments()] for x in self.samples]

    def run(self, name: str) -> dict[str, float]:
        """Make the sparse samples, write them next to the dense samples, and return the mean metrics.

        Args:
            name: name of the folder of this validation, such as "distillation-000500".

        Returns:
            Means of `psnr` (dB), `ssim`, `latent_error` (relative) and `density` over all samples. `density` is
            missing if no layer ran sparse.

        Raises:
            RuntimeError: if a file could not be written, or if the model returned non-finite values.
            CutShort: if a signal was received.
        """
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        rows: dict[str, dict[str, float]] = {}

        def compare(sample: Sample) -> None:
            dense, sparse = self._references[sample.id], self._make(sample)
            shown = [("dense", dense.pictures), (_title(sparse), sparse.pictures)]
            if not rows:
                self.sheet = media.contact_sheet(shown)
            rows[sample.id] = compared(dense, sparse)
            if self._writes:
                both = media.side_by_side(shown)
                with naming_failures():
                    self._write_pictures(folder / f"{sample.id}-sparse", sparse.pictures)
                    self._write_pictures(folder / f"{sample.id}-side_by_side", both)

        self._each(compare)
        found = self.processes.gather(rows)
        rows = {key: row for part in found for key, row in part.items()}
        means = {
            key: float(np.mean([row[key] for row in rows.values() if key in row]))
            for key in ("psnr", "ssim", "latent_error", "density")
            if any(key in row for row in rows.values())
        }
        record = jsonable({"format_version": 1, "mean": means, "samples": rows})
        with naming_failures():
            self.processes.main_only(lambda: write_json(folder / RECORD, record))
        return means

    def _make(self, sample: Sample) -> Made:
        # Processes that make a sample together must run the same steps, so none of them may stop early.
        return make_sample(self.pipe, sample, lambda: not self.together and self.stopping())

    def _write_pictures(self, stem: Path, pictures: UInt8[np.ndarray, "t h w 3"]) -> None:
        kind = "png" if len(pictures) == 1 else "mp4"
        media.write_clip(stem, pictures, kind=kind, fps=self.fps)


def _run_all(action: Callable[[Sample], None], samples: Sequence[Sample]) -> None:
    for sample in samples:
        action(sample)


def _title(sparse: Made) -> str:
    return "dense (no layer sparse)" if sparse.density is None else f"sparse, {sparse.density:.2f}"


def _read_json(path: Path) -> Any:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None
