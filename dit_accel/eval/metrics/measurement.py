"""Measurements of a set or of a part of it, which can be saved, merged and turned into metric values."""

import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_accel.eval.metrics.distances import FeatureSet, compare_features
from dit_accel.eval.metrics.judge import judge_values
from dit_accel.eval.metrics.values import mean_value
from dit_accel.eval.results.types import Extractor, MetricValue
from dit_accel.files import atomic_path
from dit_accel.sampling.sets import SampleSet
from dit_accel.tensor_files import open_safetensors

_UNITS = {"psnr": "dB", "clip_score": "points of 100"}
SIDES = ("samples", "reference")
FORMAT_VERSION = 1
_KEY = "measurement"
_SETTINGS = ("kind", "metrics", "comparisons", "sets", "extractors", "flags")
"""Fields that all parts of a measurement share."""


class Comparison(NamedTuple):
    """Comparison of the features of two sets."""

    distance: str
    """"frechet", "kernel", "precision" or "recall"."""
    source: str
    """Key in `Measurement.features`: name of the extractor, and the kind of features after a colon."""

    @property
    def extractor(self) -> str:
        return self.source.partition(":")[0]

    @property
    def kind(self) -> str:
        return self.source.partition(":")[2]


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
    """Values by metric, then by sample id. The judge has an entry for each property."""
    extractors: dict[str, Extractor] = field(default_factory=dict)
    """Networks behind `values`, by metric."""
    features: dict[str, dict[str, FeatureSet]] = field(default_factory=dict)
    """Features by side, then by source."""
    flags: dict[str, list[str]] = field(default_factory=dict)
    """Flags of networks, by source of features or by metric."""
    truncated: int = 0
    """Number of prompts that are longer than CLIP's limit."""
    shards: list[tuple[int, int]] = field(default_factory=lambda: [(0, 1)])
    """Parts that are merged: (i, n) is the i-th of n."""

    def metric_values(self) -> dict[str, MetricValue]:
        """Return all metrics in the order of `metrics`. The judge adds one metric for each property.

        Raises:
            ValueError: a metric has too few samples, or a part of the set is missing.
        """
        self.check_whole()
        out: dict[str, MetricValue] = {}
        for metric in self.metrics:
            if metric == "judge":
                out |= judge_values(self._judgements())
            elif metric in self.comparisons:
                distance, source = self.comparisons[metric]
                sides = [self.features[side][source] for side in SIDES]
                extras: dict[str, Any] = {"of": "frames"} if self.kind == "clips" else {}
                flags = self.flags.get(source, ())
                out[metric] = compare_features(distance, *sides, flags=flags, **extras)
            else:
                values = [value for _, value in sorted(self.values[metric].items())]
                extras = {"truncated": self.truncated} if metric == "clip_score" else {}
                if metric in self.flags:
                    extras["flags"] = self.flags[metric]
                unit, extractor = _UNITS.get(metric, ""), self.extractors.get(metric)
                out[metric] = mean_value(values, unit, extractor, **extras)
        for name, found in out.items():
            if single := self.values.get("judge_all" if name == "judge" else name):
                found["values"] = {
                    key: x if math.isfinite(x) else None for key, x in sorted(single.items())
                }
        return out

    def _judgements(self) -> list[dict[str, bool | None]]:
        names = {k.removeprefix("judge_"): v for k, v in self.values.items() if k[:6] == "judge_"}
        # A background that the prompt does not name has no value.
        return [
            {name: bool(x[i]) if i in x else None for name, x in names.items()}
            for i in sorted(names["all"])
        ]

    def check_whole(self) -> None:
        """Raise ValueError if a part is missing, because distances depend on the number of samples."""
        count = self.shards[0][1]
        if missing := sorted(set(range(count)) - {i for i, _ in self.shards}):
            named = ", ".join(f"{i}/{count}" for i in missing)
            raise ValueError(f"parts: {named} of the measurement missing; accepted are all {count}")

    def merge(self, other: "Measurement") -> None:
        """Add the measurement of another part of the same set.

        Raises:
            ValueError: the parts have different settings, share samples, or come from different divisions.
        """
        counts = self.shards[0][1], other.shards[0][1]
        if counts[0] != counts[1]:
            raise ValueError(
                f"parts: some are of {counts[0]}, some of {counts[1]}; accepted is one division"
            )
        for name in _SETTINGS:
            if (mine := getattr(self, name)) != (theirs := getattr(other, name)):
                raise ValueError(f"parts measured differently: {name} is {mine!r} and {theirs!r}")
        for side, ids in other.ids.items():
            if both := sorted(set(self.ids.get(side, [])) & set(ids)):
                raise ValueError(
                    f"{side}: {both[0]!r} is in two parts; accepted are parts that share nothing"
                )
            self.ids.setdefault(side, []).extend(ids)
        for metric, values in other.values.items():
            self.values.setdefault(metric, {}).update(values)
        for side, sets in other.features.items():
            for source, features in sets.items():
                if source in self.features.setdefault(side, {}):
                    self.features[side][source].merge(features)
                else:
                    self.features[side][source] = features
        self.truncated += other.truncated
        self.shards += other.shards

    def save(self, path: str | os.PathLike) -> None:
        """Write the measurement as safetensors, atomically."""
        from safetensors.torch import save_file

        values = {metric: sorted(by_id) for metric, by_id in self.values.items()}
        tensors = {
            f"values/{metric}": torch.tensor(
                [self.values[metric][x] for x in ids], dtype=torch.float64
            )
            for metric, ids in values.items()
        }
        features: list[dict[str, Any]] = []
        for side, sets in self.features.items():
            for source, one in sets.items():
                place = f"features/{len(features)}"
                tensors |= {f"{place}/{k}": v for k, v in one.state().items()}
                identity = {"extractor": one.extractor, "keep": one.keep}
                features.append({"side": side, "source": source, **identity})
        shared = {name: getattr(self, name) for name in (*_SETTINGS, "truncated", "shards", "ids")}
        about = {"format_version": FORMAT_VERSION, **shared, "values": values, "features": features}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={_KEY: json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Measurement":
        """Read a file of `save`.

        Raises:
            ValueError: the file is something else.
        """
        with open_safetensors(path) as file:
            about = json.loads((file.metadata() or {}).get(_KEY, "{}"))
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if (version := about.get("format_version")) != FORMAT_VERSION:
            raise ValueError(
                f"{path}: format_version={version!r} of a measurement; accepted is {FORMAT_VERSION}"
            )
        try:
            out = cls(**{name: about[name] for name in (*_SETTINGS, "truncated", "ids")})
            out.metrics = tuple(out.metrics)
            out.comparisons = {k: Comparison(*x) for k, x in out.comparisons.items()}
            out.shards = [(int(i), int(n)) for i, n in about["shards"]]
            for metric, ids in about["values"].items():
                values = tensors[f"values/{metric}"].tolist()
                out.values[metric] = dict(zip(ids, values, strict=True))
            for i, one in enumerate(about["features"]):
                place = f"features/{i}/"
                state = {
                    k.removeprefix(place): x for k, x in tensors.items() if k.startswith(place)
                }
                out.features.setdefault(one["side"], {})[one["source"]] = FeatureSet.from_state(
                    state, one["extractor"], keep=one["keep"]
                )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: not of a measurement ({error!r})") from None
        return out
