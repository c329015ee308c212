"""Every sample of a set, read ahead and shown to all that measures."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from torch import Tensor

from dit_accel.eval.metrics.choices import Given
from dit_accel.eval.metrics.measurement import Measurement, source_of
from dit_accel.eval.metrics.meters import ClipMeter, FeatureMeter, FrameMeter, JudgeMeter
from dit_accel.eval.metrics.pairs import check_sizes
from dit_accel.sampling.sets import SampleSet

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Sample:
    """A sample, read and resized."""

    id: str
    frames: np.ndarray
    pair: np.ndarray | None
    """The reference's frames of the same id."""
    prepared: list[list[Tensor]]
    """By extractor, then frame."""
    for_clip: list[Tensor]


@dataclass
class Meters:
    """All that looks at a sample."""

    measurement: Measurement
    frames: FrameMeter
    features: list[FeatureMeter]
    clip: ClipMeter | None
    judge: JudgeMeter | None

    def put(self, side: str, sample: Sample) -> None:
        """A sample of one side; of a reference only its features count."""
        self.measurement.ids.setdefault(side, []).append(sample.id)
        for meter, prepared in zip(self.features, sample.prepared, strict=True):
            meter.put(side, sample.id, prepared)
        if side == "reference":
            return
        self.frames.put(sample.id, sample.frames, sample.pair)
        if self.clip is not None:
            self.clip.put(sample.id, sample.for_clip)
        if self.judge is not None:
            self.judge.put(sample.id, sample.frames)

    def flush(self) -> None:
        """Also what waits for its batch to fill."""
        for meter in (*self.features, self.clip, self.judge):
            if meter is not None:
                meter.flush()


def read_all(
    given: Given, meters: Meters, shard: tuple[int, int], workers: int, progress: bool
) -> None:
    """Show every sample, and every reference, to the meters."""
    from tqdm import tqdm

    index, count = shard
    paired = frozenset(given.pairs) if meters.frames.pairs else frozenset()
    mine = given.samples.ids[index::count]
    others: tuple[str, ...] = ()
    if meters.features and isinstance(given.reference, SampleSet):
        others = given.reference.ids[index::count]

    def read(side: str, name: str) -> Sample:
        of = given.samples if side == "samples" else given.reference
        assert isinstance(of, SampleSet)
        frames = of.frames(name)
        prepared = [[x.extractor.prepare(frame) for frame in frames] for x in meters.features]
        if side == "reference":
            return Sample(name, frames, None, prepared, [])
        pair = _pair(given.reference, name, frames) if name in paired else None
        for_clip = [meters.clip.clip.prepare(x) for x in frames] if meters.clip else []
        return Sample(name, frames, pair, prepared, for_clip)

    total = len(mine) + len(others)
    with tqdm(total=total, desc="scoring", disable=not progress, mininterval=1.0) as bar:
        for side, ids in (("samples", mine), ("reference", others)):
            for found in _ahead(partial(read, side), ids, workers):
                meters.put(side, found)
                bar.update()
    meters.flush()
    if isinstance(given.reference, Measurement) and index == 0:
        saved = given.reference
        meters.measurement.ids["reference"] = list(saved.ids["samples"])
        meters.measurement.features["reference"] = {
            x.source: saved.features["samples"][x.source]
            for x in meters.measurement.comparisons.values()
        }


def _pair(reference: SampleSet | Measurement | None, name: str, frames: np.ndarray) -> np.ndarray:
    """The reference's frames of the same id."""
    assert isinstance(reference, SampleSet)
    pair = reference.frames(name)
    try:
        check_sizes(frames, pair)
    except ValueError as error:
        raise ValueError(f"sample {name!r}: {error}") from None
    return pair


def check_reference(reference: SampleSet | Measurement | None, meters: list[FeatureMeter]) -> None:
    """A saved measurement's features are those of the same networks."""
    if not isinstance(reference, Measurement):
        return
    for meter in meters:
        for kind in meter.keep:
            saved = reference.features["samples"][source_of(meter.extractor.name, kind)].extractor
            if saved != meter.extractor.record(kind):
                raise ValueError(
                    f"reference: measured with {saved}; this is {meter.extractor.record(kind)}, accepted is "
                    "the same network, weights and way of resizing"
                )


def _ahead(read: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """In order, `workers` of them under way at a time."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # after an error nobody wants the rest
            for future in waiting:
                future.cancel()
