"""Measurements of a set or of a part of it, which can be saved, merged and turned into metric values."""

import hashlib
import json
import math
import os
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from torch import Tensor

from dit_accel.eval.metrics.distances import FeatureSet, compare_features
from dit_accel.eval.metrics.values import judge_values, mean_value
from dit_accel.eval.results.types import Extractor, MetricValue
from dit_accel.files import atomic_path
from dit_accel.sampling.sets import SampleSet
from dit_accel.tensor_files import open_safetensors

_UNITS = {"psnr": "dB", "clip_score": "points of 100"}
FORMAT_VERSION = 3
_SETTINGS = ("kind", "metrics", "comparisons", "sets", "extractors", "flags")
"""Fields that all parts of a measurement share."""


class Comparison(NamedTuple):
    """Comparison of the features of two sets."""

    distance: str
    """"frechet", "kernel", "precision" or "recall"."""
    extractor: str


def fingerprint(samples: SampleSet) -> str:
    """Return a hash of a set's ids and file sizes, which does not depend on its folder."""
    digest = hashlib.sha256(samples.kind.encode())
    for name in samples.ids:
        digest.update(repr((name, [x.stat().st_size for x in samples.files(name)])).encode())
    return digest.hexdigest()


@dataclass
class Measurement:
    """Values by sample id, and features of both sets."""

    kind: str
    """"images" or "clips"."""
    metrics: tuple[str, ...]
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    """Metrics that compare features."""
    sets: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the sets by side."""
    ids: dict[str, list[str]] = field(default_factory=dict)
    """Ids of the samples that were read, by side."""
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    """Values by metric, then by sample id; for the judge by property, as "judge_shape"."""
    extractors: dict[str, Extractor] = field(default_factory=dict)
    """Networks behind `values`, by metric."""
    features: dict[str, dict[str, FeatureSet]] = field(default_factory=dict)
    """Features by side, then by extractor."""
    flags: dict[str, list[str]] = field(default_factory=dict)
    """Flags of networks, by extractor or by metric."""
    truncated: int = 0
    """Number of prompts that are longer than CLIP's limit."""
    shards: list[tuple[int, int]] = field(default_factory=lambda: [(0, 1)])
    """Parts that are merged: (i, n) is the i-th of n."""

    def metric_values(self) -> dict[str, MetricValue]:
        """Return all metrics in the order of `metrics`. The judge adds one metric for each property."""
        self.check_whole()
        out: dict[str, MetricValue] = {}
        for metric in self.metrics:
            if metric == "judge":
                out |= judge_values(self.values)
            elif metric in self.comparisons:
                distance, name = self.comparisons[metric]
                a, b = (self.features[side][name] for side in ("samples", "reference"))
                extras: dict[str, Any] = {"of": "frames"} if self.kind == "clips" else {}
                out[metric] = compare_features(distance, a, b, self.flags.get(name, []), **extras)
            else:
                values = dict(sorted(self.values[metric].items()))
                extras = {"truncated": self.truncated} if metric == "clip_score" else {}
                extras |= {"flags": self.flags[metric]} if metric in self.flags else {}
                unit, extractor = _UNITS.get(metric, ""), self.extractors.get(metric)
                out[metric] = found = mean_value([*values.values()], unit, extractor, **extras)
                found["values"] = {k: x if math.isfinite(x) else None for k, x in values.items()}
        return out

    def check_whole(self) -> None:
        """Raise ValueError if a part is missing, because distances depend on the number of samples."""
        count = self.shards[0][1]
        if missing := sorted(set(range(count)) - {i for i, _ in self.shards}):
            named = ", ".join(f"{i}/{count}" for i in missing)
            raise ValueError(f"parts: {named} of the measurement missing: must be all {count}")

    def merge(self, other: "Measurement") -> None:
        """Add the measurement of another part of the same set.

        Raises:
            ValueError: the parts have different settings, share samples, or come from different divisions.
        """
        counts = self.shards[0][1], other.shards[0][1]
        if counts[0] != counts[1]:
            raise ValueError(f"parts: of {counts[0]} and of {counts[1]}: must be of one division")
        for name in _SETTINGS:
            if (mine := getattr(self, name)) != (theirs := getattr(other, name)):
                raise ValueError(f"parts measured differently: {name} is {mine!r} and {theirs!r}")
        for side, ids in other.ids.items():
            if both := sorted(set(self.ids.get(side, [])) & set(ids)):
                raise ValueError(f"{side}: {both[0]!r} is in two parts: must be in one")
            self.ids.setdefault(side, []).extend(ids)
        for metric, values in other.values.items():
            self.values.setdefault(metric, {}).update(values)
        for side, sets in other.features.items():
            own = self.features.setdefault(side, {})
            for name, features in sets.items():
                own[name] = own[name].merged(features) if name in own else features
        self.truncated += other.truncated
        self.shards += other.shards

    def save(self, path: str | os.PathLike) -> None:
        """Write the measurement as safetensors, atomically."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        sets: list[Any] = []
        for side, found in self.features.items():
            for name, one in found.items():
                tensors |= {f"{side}/{name}/{k}": v for k, v in one.state().items()}
                sets.append([side, name, one.extractor, one.keep])
        rest = {x: getattr(self, x) for x in _SAVED}
        about = {"format_version": FORMAT_VERSION, "features": sets, **rest}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"measurement": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Measurement":
        """Read a file of `save`; a ValueError says what is wrong with another file."""
        with open_safetensors(path) as file:
            about = json.loads((file.metadata() or {}).get("measurement", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if (version := about.get("format_version")) != FORMAT_VERSION:
            raise ValueError(
                f"{path}: format_version={version!r} of a measurement: must be {FORMAT_VERSION}"
            )
        about["metrics"], about["shards"] = tuple(about["metrics"]), [*map(tuple, about["shards"])]
        about["comparisons"] = {k: Comparison(*x) for k, x in about["comparisons"].items()}
        out = cls(**{x: about[x] for x in _SAVED})
        for side, name, extractor, keep in about["features"]:
            place = f"{side}/{name}/"
            state = {k.removeprefix(place): x for k, x in tensors.items() if k.startswith(place)}
            one = FeatureSet.from_state(state, extractor, keep)
            out.features.setdefault(side, {})[name] = one
        return out


_SAVED = [x.name for x in fields(Measurement) if x.name != "features"]
