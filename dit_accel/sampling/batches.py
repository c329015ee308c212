"""The pipeline calls of a run: each batch made, its samples written and noted."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_accel import control
from dit_accel.sampling import media
from dit_accel.sampling.journal import Journal, Record
from dit_accel.sampling.pipeline_call import run_batch
from dit_accel.sampling.plan import Sample
from dit_accel.sampling.sample_files import frames_sha256, write_sample
from dit_accel.sampling.sets import Kind

WARM_UP_STEPS = 2
"""Of a call without acceleration: all its steps are of one kind."""


@dataclass
class BatchRun:
    """Makes batches, writes their samples and notes them."""

    pipe: Any
    folder: Path
    kind: Kind
    fps: float | int
    journal: Journal

    def make(
        self,
        batches: Sequence[Sequence[Sample]],
        kept: dict[str, Record],
        *,
        warm_up: bool,
        bar: dict[str, Any],
    ) -> None:
        """Every batch with a sample that is missing.

        It runs as a whole: the company of the missing samples, and with it the last bits of the result,
        are then those of a run that was never killed.
        """
        total = sum(len(batch) for batch in batches)
        done = sum(x.id in kept for batch in batches for x in batch)
        batches = [batch for batch in batches if any(x.id not in kept for x in batch)]
        if warm_up:
            # With acceleration a late step may be the first of its kind.
            plain = control.session_of(self.pipe) is None
            self._call(batches[0], **({"num_inference_steps": WARM_UP_STEPS} if plain else {}))
        with progress_bar(total=total, initial=done, **bar) as samples:
            for batch in batches:
                frames, seconds, summary = self._call(batch)
                shares = {phase: took / len(batch) for phase, took in seconds.items()}
                for sample, clip in zip(batch, frames, strict=True):
                    if sample.id in kept:
                        continue
                    record = self._write(sample, clip) | {
                        "seconds": shares,
                        "density": summary.overall_density,
                        "sparse_density": summary.density,
                        "cost": None if summary.ras is None else summary.ras.cost,
                        "batch": len(batch),
                    }
                    self.journal.append(sample.id, record)
                    samples.update()

    def _call(
        self, batch: Sequence[Sample], **changed: Any
    ) -> tuple[np.ndarray, dict[str, float], control.Summary]:
        negative = [x.sampling.negative_prompt for x in batch]
        try:
            return run_batch(
                self.pipe,
                [x.record.prompt for x in batch],
                batch[0].sampling.overridden(**changed),
                [x.seed for x in batch],
                [x for x in negative if x is not None] or None,  # a batch has all of them or none
            )
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"out of memory with {len(batch)} samples in a call ({str(error).splitlines()[0]}); what is "
                "finished stays, run it again with a smaller batch_size or size"
            ) from error

    def _write(self, sample: Sample, frames: np.ndarray) -> Record:
        """Its files; what the manifest says about them."""
        if not np.isfinite(frames).all():
            raise RuntimeError(
                f"sample {sample.id!r}: the model returned values that are not finite (does it need another "
                "dtype?)"
            )
        pictures = media.to_uint8(frames)
        try:
            files = write_sample(self.folder, sample, pictures, kind=self.kind, fps=self.fps)
        except OSError as error:
            raise RuntimeError(
                f"output_dir={str(self.folder)!r}: cannot write sample {sample.id!r} "
                f"({error.strerror or error}); what is finished stays, run it again to go on"
            ) from error
        return {
            "prompt": sample.record.prompt,
            "negative_prompt": sample.sampling.negative_prompt,
            "seed": sample.seed,
            "ref_path": sample.record.ref_path,
            "frames": list(pictures.shape),
            "files": files,
            "sha256": frames_sha256(pictures),
        }


def progress_bar(**options: Any) -> Any:
    """tqdm, on stderr, of samples."""
    from tqdm import tqdm

    return tqdm(**{"unit": "sample"} | options)


@contextlib.contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own bar, which would be one a batch."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**before | {"disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
