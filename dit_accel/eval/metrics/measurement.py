"""What was measured of a set, or of a part of it: data that can be saved, merged and made into figures."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_accel.eval.metrics.distances import (
    NEIGHBOURS,
    SUBSET_SIZE,
    SUBSETS,
    frechet_figure,
    kernel_figure,
    precision_recall_figures,
)
from dit_accel.eval.metrics.feature_set import FeatureSet
from dit_accel.eval.metrics.figures import mean_figure
from dit_accel.eval.metrics.judge import judge_figures
from dit_accel.eval.results.types import Extractor, Figure
from dit_accel.files import atomic_path
from dit_accel.sampling.sets import SampleSet

UNITS = {
    "psnr": "dB",
    "ssim": "",
    "lpips": "",
    "flicker": "",
    "clip_score": "points of 100",
    "judge": "share",
}
"""Of the metrics that give each sample a value, and of the judge."""
SIDES = ("samples", "reference")
FORMAT_VERSION = 1
_KEY = "measurement"


def source_of(extractor: str, kind: str) -> str:
    """The place of an extractor's features in a measurement."""
    return f"{extractor}:{kind}" if kind else extractor


@dataclass(frozen=True)
class Comparison:
    """A metric that compares features of two sets."""

    what: str
    """"frechet", "kernel", "precision" or "recall"."""
    source: str
    """The features' place in `Measurement.features`."""


def fingerprint(samples: SampleSet) -> str:
    """Tells two sets apart by ids and sizes of files, wherever they lie."""
    digest = hashlib.sha256(samples.kind.encode())
    for name in samples.ids:
        digest.update(repr((name, [x.stat().st_size for x in samples.files(name)])).encode())
    return digest.hexdigest()


@dataclass
class Measurement:
    """Values by sample, and features of both sets; ids, not places, say what belongs together."""

    kind: str
    """"images" or "clips"."""
    metrics: tuple[str, ...]
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    """Those of `metrics` that compare sets."""
    sets: dict[str, str] = field(default_factory=dict)
    """Which sets these are, by side: `fingerprint`."""
    ids: dict[str, list[str]] = field(default_factory=dict)
    """What was read, by side."""
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    """By metric, then by id; of the judge one entry each thing it looks at."""
    extractors: dict[str, Extractor] = field(default_factory=dict)
    """Networks behind `values`, by metric."""
    features: dict[str, dict[str, FeatureSet]] = field(default_factory=dict)
    """By side, then by source."""
    flags: dict[str, list[str]] = field(default_factory=dict)
    """By source."""
    truncated: int = 0
    """Prompts that CLIP could not read to their end."""
    shards: list[tuple[int, int]] = field(default_factory=lambda: [(0, 1)])
    """The parts that are in it: (i, n) is the i-th of n."""
    kid_subsets: int = SUBSETS
    kid_subset_size: int = SUBSET_SIZE
    neighbours: int = NEIGHBOURS

    def figures(self) -> dict[str, Figure]:
        """All metrics, in the order asked for. The judge adds one figure each thing it looks at.

        Raises:
            ValueError: too few samples for a metric, or a part of the set is missing.
        """
        self.check_whole()
        out: dict[str, Figure] = {}
        for metric in self.metrics:
            if metric == "judge":
                out |= judge_figures(self._judgements())
            elif metric in self.comparisons:
                out[metric] = self._compared(self.comparisons[metric])
            else:
                values = [value for _, value in sorted(self.values[metric].items())]
                extras = {"truncated": self.truncated} if metric == "clip_score" else {}
                extractor = self.extractors.get(metric)
                out[metric] = mean_figure(values, UNITS[metric], extractor, **extras)
        for name, found in out.items():
            if single := self.values.get("judge_all" if name == "judge" else name):
                found["values"] = {
                    key: x if math.isfinite(x) else None for key, x in sorted(single.items())
                }
        return out

    def _judgements(self) -> list[dict[str, bool | None]]:
        names = {k.removeprefix("judge_"): v for k, v in self.values.items() if k[:6] == "judge_"}
        ids = sorted(names["all"])
        # A background that the prompt does not name has no value.
        return [{name: bool(x[i]) if i in x else None for name, x in names.items()} for i in ids]

    def _compared(self, comparison: Comparison) -> Figure:
        a, b = (self.features[side][comparison.source] for side in SIDES)
        extras: dict[str, Any] = {}
        if flags := self.flags.get(comparison.source):
            extras["flags"] = flags
        if self.kind == "clips":
            extras["of"] = "frames"
        if comparison.what == "frechet":
            return frechet_figure(a, b, **extras)
        if comparison.what == "kernel":
            return kernel_figure(
                a, b, subsets=self.kid_subsets, subset_size=self.kid_subset_size, **extras
            )
        both = precision_recall_figures(a, b, neighbours=self.neighbours, **extras)
        return both[0 if comparison.what == "precision" else 1]

    def check_whole(self) -> None:
        """Distances depend on how many samples there are, so a part must not pass for the set.

        Raises:
            ValueError: a part is missing.
        """
        count = self.shards[0][1]
        if missing := sorted(set(range(count)) - {i for i, _ in self.shards}):
            named = ", ".join(f"{i}/{count}" for i in missing)
            raise ValueError(f"parts: {named} of the measurement missing; accepted are all {count}")

    def merge(self, other: "Measurement") -> None:
        """Add what was measured of another part of the same set.

        Raises:
            ValueError: the parts were measured differently, share samples, or are not of one division.
        """
        if self.shards[0][1] != other.shards[0][1]:
            raise ValueError(
                f"parts: some are of {self.shards[0][1]}, some of {other.shards[0][1]}; accepted is one "
                "division"
            )
        for name in self._settings():
            if self._settings()[name] != other._settings()[name]:
                raise ValueError(
                    f"parts measured differently: {name} is {self._settings()[name]!r} and "
                    f"{other._settings()[name]!r}"
                )
        for side, ids in other.ids.items():
            mine = self.ids.setdefault(side, [])
            if both := sorted(set(mine) & set(ids)):
                raise ValueError(
                    f"{side}: {both[0]!r} is in two parts; accepted are parts that share nothing"
                )
            mine += ids
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

    def _settings(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "metrics": list(self.metrics),
            "comparisons": {k: [v.what, v.source] for k, v in self.comparisons.items()},
            "sets": self.sets,
            "extractors": self.extractors,
            "flags": self.flags,
            "kid_subsets": self.kid_subsets,
            "kid_subset_size": self.kid_subset_size,
            "neighbours": self.neighbours,
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All tensors, and the rest as JSON data."""
        tensors: dict[str, Tensor] = {}
        values: dict[str, list[str]] = {}
        for metric, by_id in self.values.items():
            values[metric] = sorted(by_id)
            tensors[f"values/{metric}"] = torch.tensor(
                [by_id[x] for x in values[metric]], dtype=torch.float64
            )
        features: list[dict[str, Any]] = []
        for side, sets in self.features.items():
            for source, one in sets.items():
                place = f"features/{len(features)}"
                tensors |= {f"{place}/{k}": v for k, v in one.state().items()}
                features.append(
                    {"side": side, "source": source, "extractor": one.extractor, "keep": one.keep}
                )
        about = {
            "format_version": FORMAT_VERSION,
            **self._settings(),
            "truncated": self.truncated,
            "shards": self.shards,
            "ids": self.ids,
            "values": values,
            "features": features,
        }
        return tensors, about

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> "Measurement":
        """The measurement that gave this state.

        Raises:
            ValueError: it is of none.
        """
        try:
            out = cls(
                about["kind"],
                tuple(about["metrics"]),
                {k: Comparison(*v) for k, v in about["comparisons"].items()},
                about["sets"],
                about["ids"],
                extractors=about["extractors"],
                flags=about["flags"],
                truncated=about["truncated"],
                shards=[(int(i), int(n)) for i, n in about["shards"]],
                kid_subsets=about["kid_subsets"],
                kid_subset_size=about["kid_subset_size"],
                neighbours=about["neighbours"],
            )
            for metric, ids in about["values"].items():
                out.values[metric] = dict(
                    zip(ids, tensors[f"values/{metric}"].tolist(), strict=True)
                )
            for i, one in enumerate(about["features"]):
                place = f"features/{i}/"
                parts = {
                    k.removeprefix(place): v for k, v in tensors.items() if k.startswith(place)
                }
                out.features.setdefault(one["side"], {})[one["source"]] = FeatureSet.from_state(
                    parts, one["extractor"], keep=one["keep"]
                )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not of a measurement: {error!r}") from None
        return out

    def save(self, path: str | os.PathLike) -> None:
        """Write as safetensors, atomically."""
        from safetensors.torch import save_file

        tensors, about = self.state()
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={_KEY: json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Measurement":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get(_KEY, "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
        version = about.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path}: format_version={version!r} of a measurement; accepted is {FORMAT_VERSION}"
            )
        try:
            return cls.from_state(tensors, about)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
