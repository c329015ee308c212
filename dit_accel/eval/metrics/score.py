"""`score` and `measure`: every metric of a set of samples in one pass over its files."""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from tqdm import tqdm

from dit_accel.demo.caption_judge import judge_captions
from dit_accel.eval.metrics.choices import INCEPTION, PAIRED, Given
from dit_accel.eval.metrics.clip_score import ClipScore
from dit_accel.eval.metrics.distances import KEEP, FeatureSet
from dit_accel.eval.metrics.features import (
    TINY,
    Extractor,
    check_resize,
    load_inception,
    tiny_extractor,
)
from dit_accel.eval.metrics.measurement import Measurement, fingerprint
from dit_accel.eval.metrics.networks import NAMES, Networks
from dit_accel.eval.metrics.pairs import Lpips, flicker, psnr, ssim
from dit_accel.eval.results.types import MetricValue
from dit_accel.sampling.devices import pick_device
from dit_accel.sampling.prompt_sets import load_prompts
from dit_accel.sampling.sets import SampleSet
from dit_accel.sampling.settings import check_count

Source = SampleSet | str | os.PathLike


def load_networks(
    arguments: Mapping[str, Any], metrics: Sequence[str], device: Any = "cpu"
) -> dict[str, Any]:
    """Return the fields of `Networks` in `arguments`, with the networks loaded that `metrics` need.

    Use it to read each network once for several sets, or to check the files before sampling.
    """
    usual = asdict(Networks())
    if unknown := sorted(set(arguments) - set(usual)):
        raise TypeError(f"unexpected arguments: {', '.join(unknown)}")
    out = {**usual, **arguments}
    other, paths = out["allow_other_weights"], (str, os.PathLike)
    if set(metrics) & set(INCEPTION) and isinstance(weights := out["inception"], paths):
        resize = out["resize"]
        out["inception"] = load_inception(
            weights, resize=resize, allow_other_weights=other, device=device
        )
    if "lpips" in metrics and isinstance(weights := out["lpips"], paths):
        net = out["lpips_net"]
        out["lpips"] = Lpips(weights, net=net, allow_other_weights=other, device=device)
    if "clip_score" in metrics and isinstance(weights := out["clip"], paths):
        out["clip"] = ClipScore(weights, revision=out["clip_revision"], device=device)
    return out


def score(
    images: Source, *, reference: Source | Measurement | None = None, **options: Any
) -> dict[str, MetricValue]:
    """Return the metrics of a set of samples by name; for the arguments see `measure`."""
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
        images: the set, or its folder.
        reference: the set to compare with, or its folder; for metrics that compare features also a saved
            measurement. Without it only the features of `images` are computed, to be saved as a reference.
        prompts: prompts by id, or a prompts file or shipped set with the samples' ids. Default: those in the
            set's manifest.
        metrics: names. Default: all that the arguments allow. "psnr", "ssim" and "lpips" need reference samples
            of the same ids, "flicker" needs clips, "clip_score" a CLIP model, "judge" prompts of the demo.
            "fid", "kid", "precision" and "recall" need Inception. "fd_", "kd_", "precision_" and "recall_" take
            the name of `extractor`, or "tiny".
        extractor: any other network.
        allow_partial: compare only the ids that both sets have.
        batch_size, workers: pictures per forward pass of a network, and threads that read and resize.
        device: "auto", "cpu", "cuda", ...
        progress: show a progress bar on stderr.
        shard: (i, n) measures every n-th sample from the i-th on. The n parts, merged, are the whole.
        need_reference: refuse metrics that compare features when there is no reference.
        networks: fields of `Networks`, as `inception`, `clip`, `lpips`; or the result of `load_networks`.

    Raises:
        ValueError: bad input; raised before any work where possible.
    """
    check_resize(networks.get("resize", "clean"))
    check_count("batch_size", batch_size)
    check_count("workers", workers)
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard={shard}: must be (i, n) with 0 <= i < n")
    name = None if extractor is None else extractor.name
    if name in (TINY, "inception"):
        raise ValueError(f"extractor: name={name!r} is taken; pass another")
    place = pick_device(device)
    samples = images if isinstance(images, SampleSet) else SampleSet.open(images)
    saved = open_reference(reference)
    if prompts is None:
        prompts = samples.prompts
    elif not isinstance(prompts, Mapping):
        prompts = {record.id: record.prompt for record in load_prompts(prompts)}
    usable = tuple(x for x in NAMES if networks.get(x) is not None)
    given = Given(samples, saved, dict(prompts), usable, name, allow_partial, need_reference)
    choices = given.choose(metrics)
    loaded = load_networks(networks, list(choices), place)
    comparisons = {name: x for name, x in choices.items() if x is not None}
    measurement = Measurement(samples.kind, tuple(choices), comparisons, shards=[shard])
    measurement.sets["samples"] = fingerprint(samples)
    for metric, network in (("lpips", "lpips"), ("clip_score", "clip")):
        if metric in choices:
            measurement.extractors[metric] = loaded[network].record
            measurement.flags |= {metric: x} if (x := getattr(loaded[network], "flags", [])) else {}
    extractors: dict[str, Extractor] = {}
    for key in {x.extractor: None for x in comparisons.values()}:
        found = extractor if key == name else loaded.get(key)
        extractors[key] = one = found or tiny_extractor(device=place)
        measurement.flags |= {key: one.flags} if one.flags else {}
        if isinstance(saved, Measurement):
            features = saved.features["samples"][key]
            if features.extractor != one.record:
                raise ValueError(
                    f"reference: measured with {features.extractor}: must be the network {one.record}"
                )
            if shard[0] == 0:  # the other parts leave the reference to this one
                measurement.ids["reference"] = list(saved.ids["samples"])
                measurement.features.setdefault("reference", {})[key] = features
    if isinstance(saved, SampleSet):
        measurement.sets["reference"] = fingerprint(saved)
    elif saved is not None:
        measurement.sets["reference"] = saved.sets["samples"]
    Pass(given, measurement, extractors, loaded, batch_size).run(shard, workers, progress)
    return measurement


def open_reference(source: Source | Measurement | None) -> SampleSet | Measurement | None:
    """Return the set in a folder, or the whole measurement in a .safetensors file."""
    if isinstance(source, str | os.PathLike):
        saved = Path(source).suffix == ".safetensors"
        source = Measurement.load(source) if saved else SampleSet.open(source)
    if isinstance(source, Measurement):
        source.check_whole()
    return source


class Sample(NamedTuple):
    """A sample with the reference's frames of the same id, and its pictures for each network."""

    id: str
    frames: np.ndarray
    pair: np.ndarray | None
    prepared: dict[str, list[Tensor]]
    for_clip: list[Tensor]


@dataclass
class Pass:
    """Metrics and networks of one pass over the files, which fills `measurement`."""

    given: Given
    measurement: Measurement
    extractors: dict[str, Extractor]
    networks: dict[str, Any]
    batch_size: int

    def run(self, shard: tuple[int, int], workers: int, progress: bool) -> None:
        """Measure every n-th sample and reference from the i-th on, for the shard (i, n)."""
        sets = {"samples": self.given.samples}
        if self.extractors and isinstance(self.given.reference, SampleSet):
            sets["reference"] = self.given.reference
        ids = {side: x.ids[shard[0] :: shard[1]] for side, x in sets.items()}
        total = sum(map(len, ids.values()))
        bar = tqdm(total=total, desc="scoring", disable=not progress, mininterval=1.0)
        with ThreadPoolExecutor(workers) as pool, bar:
            for side, samples in sets.items():
                batch: list[Sample] = []
                for part in _chunks(ids[side], workers):  # few, because clips are large
                    for sample in pool.map(partial(self._read, side, samples), part):
                        batch.append(sample)
                        if sum(len(x.frames) for x in batch) >= self.batch_size:
                            self._measure(side, batch)
                            batch = []
                        bar.update()
                self._measure(side, batch)

    def _read(self, side: str, samples: SampleSet, name: str) -> Sample:
        frames = samples.frames(name)
        prepared = {k: [x.prepare(y) for y in frames] for k, x in self.extractors.items()}
        pair, for_clip, reference = None, [], self.given.reference
        if side == "samples" and "clip_score" in self.measurement.metrics:
            for_clip = [self.networks["clip"].prepare(x) for x in frames]
        if side == "samples" and set(PAIRED) & set(self.measurement.metrics):
            assert isinstance(reference, SampleSet)
            pair = reference.frames(name) if name in self.given.pairs else None
        return Sample(name, frames, pair, prepared, for_clip)

    def _measure(self, side: str, batch: list[Sample]) -> None:
        """Measure samples, or only the features of references."""
        self.measurement.ids.setdefault(side, []).extend(x.id for x in batch)
        sets = self.measurement.features.setdefault(side, {})
        compared = self.measurement.comparisons.values()
        by_rows = {x.extractor for x in compared if x.distance != "frechet"}
        for key, extractor in self.extractors.items():
            frames = [(f"{x.id}/{i}", y) for x in batch for i, y in enumerate(x.prepared[key])]
            for part in _chunks(frames, self.batch_size):
                features = extractor([image for _, image in part])
                if key not in sets:
                    rows = KEEP if key in by_rows else 0
                    sets[key] = FeatureSet(extractor.record, features.shape[1], keep=rows)
                sets[key].add(features, [name for name, _ in part])
        if side == "reference":
            return
        metrics = self.measurement.metrics
        paired: dict[str, Any] = {"psnr": psnr, "ssim": ssim, "lpips": self.networks.get("lpips")}
        for x in batch:
            if "flicker" in metrics:
                self._put("flicker", x.id, flicker(x.frames))
            for name in set(paired) & set(metrics) if x.pair is not None else ():
                self._put(name, x.id, paired[name](x.frames, x.pair))
        if "clip_score" in metrics:
            self._measure_clip(batch)
        if "judge" in metrics:
            self._measure_judge(batch)

    def _measure_clip(self, batch: list[Sample]) -> None:
        clip, prompts = self.networks["clip"], self.given.prompts
        self.measurement.truncated += sum(clip.truncated([prompts[x.id] for x in batch]))
        found: dict[str, list[float]] = defaultdict(list)
        for part in _chunks([(x.id, y) for x in batch for y in x.for_clip], self.batch_size):
            scores = clip([image for _, image in part], [prompts[name] for name, _ in part])
            for (name, _), score in zip(part, scores, strict=True):
                found[name].append(score)
        for name, scores in found.items():
            self._put("clip_score", name, float(np.mean(scores)))

    def _measure_judge(self, batch: list[Sample]) -> None:
        still = self.given.samples.kind == "images"
        for _, group in groupby(batch, key=lambda x: x.frames.shape):
            same = list(group)
            prompts = [self.given.prompts[x.id] for x in same]
            rights = judge_captions([x.frames for x in same], prompts, still=still)
            for x, right in zip(same, rights, strict=True):
                for part, value in right.items():
                    if value is not None:
                        self._put(f"judge_{part}", x.id, float(value))

    def _put(self, metric: str, name: str, value: float) -> None:
        self.measurement.values.setdefault(metric, {})[name] = value


def _chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
