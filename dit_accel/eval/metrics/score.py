"""`score` and `measure`: every metric of a set of samples in one pass over its files."""

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from dit_accel.eval.metrics.choices import PAIRED, Given
from dit_accel.eval.metrics.distances import KEEP, FeatureSet
from dit_accel.eval.metrics.features import TINY, Extractor, check_resize, tiny_extractor
from dit_accel.eval.metrics.judge import judge
from dit_accel.eval.metrics.measurement import Measurement, fingerprint
from dit_accel.eval.metrics.networks import given_networks, load_networks
from dit_accel.eval.metrics.pairs import flicker, psnr, ssim
from dit_accel.eval.results.types import MetricValue
from dit_accel.sampling.sets import SampleSet

Source = SampleSet | str | os.PathLike
Item = TypeVar("Item")
Result = TypeVar("Result")


def score(
    images: Source, *, reference: Source | Measurement | None = None, **options: Any
) -> dict[str, MetricValue]:
    """Return the metrics of a set of samples by name.

    Args:
        images: the set, or its folder.
        reference: the set to compare with, or its folder; for metrics that compare features also a saved
            measurement of that set.
        options: further arguments of `measure`.

    Raises:
        ValueError: bad input; raised before any work where possible.
    """
    return measure(images, reference=reference, need_reference=True, **options).metric_values()


def measure(
    images: Source,
    *,
    reference: Source | Measurement | None = None,
    prompts: Mapping[str, str] | str | os.PathLike | None = None,
    metrics: Sequence[str] | None = None,
    extractor: Extractor | None = None,
    allow_partial: bool = False,
    batch_size: int = 32,
    workers: int = 2,
    device: str = "auto",
    progress: bool = True,
    shard: tuple[int, int] = (0, 1),
    need_reference: bool = False,
    **networks: Any,
) -> Measurement:
    """Measure a set of samples, or a part of it, for saving, merging, or `Measurement.metric_values`.

    Args:
        images, reference: see `score`. Without a reference only the features of `images` are computed, to be
            saved as a reference.
        prompts: prompts by id, or a prompts file or shipped set whose ids are the samples'. Default: the
            prompts in the set's manifest.
        metrics: names. Default: all that the arguments allow. "psnr", "ssim" and "lpips" need reference samples
            of the same ids, "flicker" needs clips, "clip_score" a CLIP model, "judge" prompts of the demo.
            "fid", "fid_768", "fid_192", "fid_64", "sfid", "kid", "precision" and "recall" need Inception.
            "fd_", "kd_", "precision_" and "recall_" take the name of `extractor`, or "tiny".
        extractor: any other network.
        allow_partial: compare only the ids that both sets have.
        batch_size: pictures per forward pass of a network.
        workers: threads that read and resize.
        device: "auto", "cpu", "cuda", ...
        progress: show a progress bar on stderr.
        shard: (i, n) measures every n-th sample from the i-th on. The merged n parts are the whole measurement.
        need_reference: refuse metrics that compare features when there is no reference.
        networks: fields of `Networks`, as `inception`, `clip`, `lpips`; or the result of `Networks.loaded`.

    Raises:
        ValueError: bad input; raised before any work where possible.
    """
    from dit_accel.sampling.devices import pick_device
    from dit_accel.sampling.settings import check_count

    check_resize(networks.get("resize", "clean"))
    check_count("batch_size", batch_size)
    check_count("workers", workers)
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard={shard}: accepted is (i, n) with 0 <= i < n")
    if extractor is not None and extractor.name in (TINY, "inception"):
        raise ValueError(f"extractor: name={extractor.name!r} is taken; accepted is another")
    place = pick_device(device)
    samples = images if isinstance(images, SampleSet) else SampleSet.open(images)
    given = Given(
        samples,
        open_reference(reference),
        _prompts(samples, prompts),
        given_networks(networks),
        None if extractor is None else extractor.name,
        allow_partial,
        need_reference,
    )
    choices = given.choose(metrics)
    loaded = load_networks(networks, list(choices), place)
    keep: dict[str, dict[str, int]] = {}  # rows by extractor and kind of features
    for comparison in choices.values():
        if comparison is not None:
            rows = keep.setdefault(comparison.extractor, {})
            needed = 0 if comparison.distance == "frechet" else KEEP
            rows[comparison.kind] = max(rows.get(comparison.kind, 0), needed)
    extractors: dict[str, Extractor] = {"inception": loaded.get("inception")}
    if TINY in keep:
        extractors[TINY] = tiny_extractor(device=place)
    if extractor is not None:
        extractors[extractor.name] = extractor
    used = [(extractors[name], kinds) for name, kinds in keep.items()]
    measurement = Measurement(
        samples.kind,
        tuple(choices),
        {name: x for name, x in choices.items() if x is not None},
        sets={"samples": fingerprint(samples)},
        shards=[shard],
    )
    for metric, network in (("lpips", "lpips"), ("clip_score", "clip")):
        if metric in choices:
            measurement.extractors[metric] = loaded[network].record
            measurement.flags |= {metric: x} if (x := loaded[network].flags) else {}
    for one, kinds in used:
        measurement.flags |= {one.source(x): one.flags for x in kinds if one.flags}
    saved = given.reference
    if isinstance(saved, SampleSet):
        measurement.sets["reference"] = fingerprint(saved)
    elif saved is not None:
        _use_saved(saved, measurement, used)
    Pass(given, measurement, used, loaded, batch_size).run(shard, workers, progress)
    return measurement


def _use_saved(
    saved: Measurement, measurement: Measurement, used: list[tuple[Extractor, dict[str, int]]]
) -> None:
    """Take the features of a saved measurement as the reference's, in the first part only.

    Raises:
        ValueError: they are of other networks.
    """
    measurement.sets["reference"] = saved.sets["samples"]
    features = saved.features["samples"]
    for one, kinds in used:
        for kind in kinds:
            found, record = features[one.source(kind)], one.record(kind)
            if found.extractor != record:
                raise ValueError(
                    f"reference: measured with {found.extractor}; accepted is {record}: the same network, weights "
                    "and way of resizing"
                )
            if measurement.shards[0][0] == 0:
                measurement.ids["reference"] = list(saved.ids["samples"])
                measurement.features.setdefault("reference", {})[one.source(kind)] = found


def open_reference(source: Source | Measurement | None) -> SampleSet | Measurement | None:
    """Return the set in a folder, or the measurement in a .safetensors file.

    Raises:
        ValueError: the path holds neither, or only a part of a measurement.
    """
    if source is None or isinstance(source, SampleSet):
        return source
    if isinstance(source, Measurement) or Path(source).suffix == ".safetensors":
        saved = source if isinstance(source, Measurement) else Measurement.load(source)
        saved.check_whole()
        return saved
    return SampleSet.open(source)


def _prompts(
    samples: SampleSet, prompts: Mapping[str, str] | str | os.PathLike | None
) -> dict[str, str]:
    if prompts is None:
        return samples.prompts
    if isinstance(prompts, Mapping):
        return dict(prompts)
    from dit_accel.sampling.prompt_sets import load_prompts

    return {record.id: record.prompt for record in load_prompts(prompts)}


class Sample(NamedTuple):
    """A sample that was read and prepared for the networks."""

    id: str
    frames: np.ndarray
    pair: np.ndarray | None
    """The reference's frames of the same id."""
    prepared: list[list[Tensor]]
    """Pictures by extractor, then by frame."""
    for_clip: list[Tensor]
    """Pictures for CLIP by frame."""


@dataclass
class Pass:
    """Metrics and networks of one pass over the files; `measurement` gets what they measure."""

    given: Given
    measurement: Measurement
    extractors: list[tuple[Extractor, dict[str, int]]]
    """Networks, with the number of rows to keep for each kind of features."""
    networks: dict[str, Any]
    """Loaded "lpips" and "clip", where their metrics are measured."""
    batch_size: int

    def run(self, shard: tuple[int, int], workers: int, progress: bool) -> None:
        """Measure every n-th sample and reference from the i-th on, for the shard (i, n)."""
        from tqdm import tqdm

        sets = {"samples": self.given.samples}
        if self.extractors and isinstance(self.given.reference, SampleSet):
            sets["reference"] = self.given.reference
        ids = {side: x.ids[shard[0] :: shard[1]] for side, x in sets.items()}
        total = sum(map(len, ids.values()))
        with tqdm(total=total, desc="scoring", disable=not progress, mininterval=1.0) as bar:
            for side, samples in sets.items():
                batch: list[Sample] = []
                for sample in _ahead(partial(self._read, side, samples), ids[side], workers):
                    batch.append(sample)
                    if sum(len(x.frames) for x in batch) >= self.batch_size:
                        self._measure(side, batch)
                        batch = []
                    bar.update()
                self._measure(side, batch)

    def _read(self, side: str, samples: SampleSet, name: str) -> Sample:
        frames = samples.frames(name)
        prepared = [[x.prepare(frame) for frame in frames] for x, _ in self.extractors]
        pair, for_clip, reference = None, [], self.given.reference
        if side == "samples" and "clip_score" in self.measurement.metrics:
            for_clip = [self.networks["clip"].prepare(x) for x in frames]
        if side == "samples" and set(PAIRED) & set(self.measurement.metrics):
            assert isinstance(reference, SampleSet)
            pair = reference.frames(name) if name in self.given.pairs else None
        return Sample(name, frames, pair, prepared, for_clip)

    def _measure(self, side: str, batch: list[Sample]) -> None:
        """Measure samples; of references only the features."""
        self.measurement.ids.setdefault(side, []).extend(x.id for x in batch)
        sets = self.measurement.features.setdefault(side, {})
        for place, (extractor, keep) in enumerate(self.extractors):
            frames = [(x.id, i, y) for x in batch for i, y in enumerate(x.prepared[place])]
            for part in _chunks(frames, self.batch_size):
                found = extractor([image for _, _, image in part])
                for kind, rows in keep.items():
                    source, features = extractor.source(kind), found[kind]
                    if source not in sets:
                        record = extractor.record(kind)
                        sets[source] = FeatureSet(record, features.shape[1], keep=rows)
                    sets[source].add(features, [f"{name}/{i}" for name, i, _ in part])
        if side == "reference":
            return
        metrics = self.measurement.metrics
        for x in batch:
            if "flicker" in metrics:
                self._put("flicker", x.id, flicker(x.frames))
            if x.pair is not None:
                paired = {"psnr": psnr, "ssim": ssim, "lpips": self.networks.get("lpips")}
                for name in set(paired) & set(metrics):
                    self._put(name, x.id, paired[name](x.frames, x.pair))
        if "clip_score" in metrics:
            self._measure_clip(batch)
        if "judge" in metrics:
            self._measure_judge(batch)

    def _measure_clip(self, batch: list[Sample]) -> None:
        clip, prompts = self.networks["clip"], self.given.prompts
        self.measurement.truncated += sum(clip.truncated([prompts[x.id] for x in batch]))
        sums: dict[str, float] = defaultdict(float)
        for part in _chunks([(x.id, y) for x in batch for y in x.for_clip], self.batch_size):
            scores = clip([image for _, image in part], [prompts[name] for name, _ in part])
            for (name, _), score in zip(part, scores, strict=True):
                sums[name] += score
        for x in batch:
            self._put("clip_score", x.id, sums[x.id] / len(x.frames))

    def _measure_judge(self, batch: list[Sample]) -> None:
        still = self.given.samples.kind == "images"
        for _, group in groupby(batch, key=lambda x: x.frames.shape):
            same = list(group)
            prompts = [self.given.prompts[x.id] for x in same]
            rights = judge([x.frames for x in same], prompts, still=still)
            for x, right in zip(same, rights, strict=True):
                for part, value in right.items():
                    if value is not None:
                        self._put(f"judge_{part}", x.id, float(value))

    def _put(self, metric: str, name: str, value: float) -> None:
        self.measurement.values.setdefault(metric, {})[name] = value


def _chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _ahead(read: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Yield results in order, with `workers` items being read at a time."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # after an error the others are not needed
            for future in waiting:
                future.cancel()
