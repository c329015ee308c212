"""What looks at samples one after the other while a set is read, in batches where a network runs."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from dit_accel.eval.metrics.clip_score import ClipScore, scores
from dit_accel.eval.metrics.feature_set import FeatureSet
from dit_accel.eval.metrics.features import Extractor
from dit_accel.eval.metrics.flicker import flicker
from dit_accel.eval.metrics.judge import judge
from dit_accel.eval.metrics.measurement import Measurement, source_of
from dit_accel.eval.metrics.pairs import Lpips, psnr, ssim

Frames = UInt8[np.ndarray, "t h w 3"]
Item = TypeVar("Item")


class Batcher(Generic[Item]):
    """Gathers items and hands over full batches."""

    def __init__(self, size: int, run: Callable[[list[Item]], None]) -> None:
        self.size, self.run = size, run
        self.waiting: list[Item] = []

    def put(self, item: Item) -> None:
        self.waiting.append(item)
        if len(self.waiting) >= self.size:
            self.flush()

    def flush(self) -> None:
        """Also what does not fill a batch."""
        batch, self.waiting = self.waiting, []
        if batch:
            self.run(batch)


class FeatureMeter:
    """Features of every frame, of samples and of references; `keep`: rows by kind."""

    def __init__(
        self,
        extractor: Extractor,
        keep: dict[str, int],
        measurement: Measurement,
        batch_size: int,
    ) -> None:
        self.extractor, self.keep = extractor, keep
        self.measurement = measurement
        if extractor.flags:
            measurement.flags |= {self._source(kind): extractor.flags for kind in keep}
        self.batches: dict[str, Batcher[tuple[str, Tensor]]] = {}
        self.batch_size = batch_size

    def put(self, side: str, name: str, prepared: Sequence[Tensor]) -> None:
        """Prepared frames of a sample."""
        if side not in self.batches:
            self.batches[side] = Batcher(self.batch_size, lambda batch: self._run(side, batch))
        for i, image in enumerate(prepared):
            self.batches[side].put((f"{name}/{i}", image))

    def _run(self, side: str, batch: list[tuple[str, Tensor]]) -> None:
        features = self.extractor([image for _, image in batch])
        sets = self.measurement.features.setdefault(side, {})
        for kind, keep in self.keep.items():
            source = self._source(kind)
            if source not in sets:
                sets[source] = FeatureSet(
                    self.extractor.record(kind), features[kind].shape[1], keep=keep
                )
            sets[source].add(features[kind], [name for name, _ in batch])

    def _source(self, kind: str) -> str:
        return source_of(self.extractor.name, kind)

    def flush(self) -> None:
        for batch in self.batches.values():
            batch.flush()


class ClipMeter:
    """CLIPScore of every frame, averaged over a sample's frames."""

    def __init__(
        self, clip: ClipScore, prompts: dict[str, str], measurement: Measurement, batch_size: int
    ) -> None:
        self.clip, self.measurement = clip, measurement
        measurement.extractors["clip_score"] = clip.record
        self.batch: Batcher[tuple[str, int, Tensor]] = Batcher(batch_size, self._run)
        self.prompts = prompts

    def put(self, name: str, prepared: Sequence[Tensor]) -> None:
        for image in prepared:
            self.batch.put((name, len(prepared), image))

    def _run(self, batch: list[tuple[str, int, Tensor]]) -> None:
        new = list(dict.fromkeys(self.prompts[name] for name, _, _ in batch))
        texts = dict(zip(new, self.clip.text_embeddings(new), strict=True))
        values = scores(
            self.clip.image_embeddings([image for _, _, image in batch]),
            torch.stack([texts[self.prompts[name]] for name, _, _ in batch]),
        )
        of = self.measurement.values.setdefault("clip_score", {})
        for (name, frames, _), value in zip(batch, values, strict=True):
            if name not in of:
                self.measurement.truncated += self.clip.truncated([self.prompts[name]])[0]
            of[name] = of.get(name, 0.0) + value / frames

    def flush(self) -> None:
        self.batch.flush()


class JudgeMeter:
    """What the demo's judge sees."""

    def __init__(
        self, prompts: dict[str, str], still: bool, measurement: Measurement, batch_size: int
    ) -> None:
        self.prompts, self.still, self.measurement = prompts, still, measurement
        self.batch: Batcher[tuple[str, Any]] = Batcher(batch_size, self._run)

    def put(self, name: str, frames: Frames) -> None:
        if self.batch.waiting and self.batch.waiting[0][1].shape != frames.shape:
            self.batch.flush()
        self.batch.put((name, frames))

    def _run(self, batch: list[tuple[str, Any]]) -> None:
        prompts = [self.prompts[name] for name, _ in batch]
        rights = judge([frames for _, frames in batch], prompts, still=self.still)
        for (name, _), right in zip(batch, rights, strict=True):
            for part, value in right.items():
                if value is not None:
                    self.measurement.values.setdefault(f"judge_{part}", {})[name] = float(value)

    def flush(self) -> None:
        self.batch.flush()


class FrameMeter:
    """What needs no batch: flicker, and distances to the reference's sample of the same id."""

    def __init__(self, metrics: set[str], lpips: Lpips | None, measurement: Measurement) -> None:
        alone: dict[str, Callable[[Any], float]] = {"flicker": flicker}
        pairs: dict[str, Callable[[Any, Any], float]] = {"psnr": psnr, "ssim": ssim}
        if lpips is not None:
            pairs["lpips"] = lpips
            measurement.extractors["lpips"] = lpips.record
        self.alone = {k: v for k, v in alone.items() if k in metrics}
        self.pairs = {k: v for k, v in pairs.items() if k in metrics}
        self.measurement = measurement

    def put(self, name: str, frames: Frames, reference: Frames | None) -> None:
        values = {metric: of(frames) for metric, of in self.alone.items()}
        if reference is not None:
            values |= {metric: of(frames, reference) for metric, of in self.pairs.items()}
        for metric, value in values.items():
            self.measurement.values.setdefault(metric, {})[name] = value
