"""Names of metrics, their needs, and whether the given sets, prompts and networks suffice."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dit_accel.demo.caption_judge import unknown_prompt
from dit_accel.eval.metrics.distances import NEIGHBOURS
from dit_accel.eval.metrics.features import TINY
from dit_accel.eval.metrics.measurement import Comparison, Measurement
from dit_accel.sampling.sets import SampleSet, pair_ids

PAIRED = ("psnr", "ssim", "lpips")
"""Metrics that compare a sample with the reference's sample of the same id."""
ALONE = ("flicker", "clip_score", "judge")
"""Metrics that need no reference."""
INCEPTION = {
    "fid": Comparison("frechet", "inception"),
    "kid": Comparison("kernel", "inception"),
    "precision": Comparison("precision", "inception"),
    "recall": Comparison("recall", "inception"),
}
"""Metrics of FID's network; no other network's metrics have these names."""
_DISTANCES = {"fd": "frechet", "kd": "kernel", "precision": "precision", "recall": "recall"}
"""Distances of other networks by prefix: fd_tiny, kd_tiny, ..."""


@dataclass(frozen=True)
class Given:
    """Sets, prompts by sample id, and networks that a caller passes."""

    samples: SampleSet
    reference: SampleSet | Measurement | None
    prompts: dict[str, str]
    networks: tuple[str, ...]
    """Networks with weights, of `networks.NAMES`."""
    extractor: str | None = None
    """Name of the caller's own extractor."""
    allow_partial: bool = False
    need_reference: bool = True

    def choose(self, metrics: Sequence[str] | None) -> dict[str, Comparison | None]:
        """Return the metrics to measure, with the comparison of those that compare features.

        Args:
            metrics: names. None: all metrics that can be measured.

        Raises:
            ValueError: a name is unknown, or its needs are not met.
        """
        names = self._default() if metrics is None else list(dict.fromkeys(metrics))
        if not names:
            raise ValueError(
                f"metrics={metrics}: nothing can be measured; pass a name, a reference, prompts of the demo, or a "
                "CLIP model"
            )
        for name in names:
            if missing := self._missing(name):
                raise ValueError(f"metric {name!r} {missing}")
        if set(names) & set(PAIRED):
            _ = self.pairs
        return {name: self._comparisons.get(name) for name in names}

    def _default(self) -> list[str]:
        """Return the metrics that the arguments were given for, and those that need nothing else."""
        paired = [x for x in PAIRED if x != "lpips" or "lpips" in self.networks]
        if unpaired := self._unpaired():
            sys.stderr.write(f"note: {', '.join(paired)} left out: {unpaired}\n")
        if unpaired or not isinstance(self.reference, SampleSet):
            paired = []
        clip = "clip" in self.networks
        alone = [x for x in ALONE if not self._missing(x) or (x == "clip_score" and clip)]
        comparing = list(INCEPTION) if "inception" in self.networks else []
        # The shipped network knows the demo's pictures only.
        if self.extractor is not None or not comparing:
            comparing += [f"{prefix}_{self.extractor or TINY}" for prefix in _DISTANCES]
        return [*paired, *alone, *(x for x in comparing if not self._missing(x))]

    def _unpaired(self) -> str | None:
        """Return why the reference set holds other pictures instead of pairs."""
        other = self.reference
        if not isinstance(other, SampleSet):
            return None
        if other.kind != self.samples.kind:
            return f"{self.samples.kind} against {other.kind}"
        common = sorted(set(self.samples.ids) & set(other.ids))
        if not common:
            return "no id is in both sets"
        sizes = [_size(x.files(common[0])[0]) for x in (self.samples, other)]
        if sizes[0] != sizes[1]:
            return f"sample {common[0]!r} is {sizes[0]}, and {sizes[1]} in the reference"
        return None

    @cached_property
    def pairs(self) -> tuple[str, ...]:
        """Ids of the samples to compare one by one; a ValueError says where ids or sizes differ."""
        assert isinstance(self.reference, SampleSet)
        ids = pair_ids(self.samples, self.reference, allow_partial=self.allow_partial)
        for name in ids:
            files = [x.files(name) for x in (self.samples, self.reference)]
            found = [f"{len(x)} of {_size(x[0])}" for x in files]
            if found[0] != found[1]:
                raise ValueError(
                    f"sample {name!r}: {found[0]} in {self.samples.path} and {found[1]} in "
                    f"{self.reference.path}; must have as many frames of the same size"
                )
        return ids

    @cached_property
    def _comparisons(self) -> dict[str, Comparison]:
        """All metrics that compare features."""
        own = [x for x in (self.extractor, TINY) if x is not None]
        others = {f"{k}_{name}": Comparison(x, name) for name in own for k, x in _DISTANCES.items()}
        return {**INCEPTION, **others}

    def _missing(self, metric: str) -> str | None:
        """Return why a metric cannot be measured, as the end of a sentence; None if it can."""
        networks = {"lpips": "lpips", "clip_score": "clip"} | dict.fromkeys(INCEPTION, "inception")
        network = networks.get(metric)
        if metric not in (*PAIRED, *ALONE, *self._comparisons):
            return f"is none of {', '.join([*PAIRED, *ALONE, *self._comparisons])}"
        if metric in PAIRED and not isinstance(self.reference, SampleSet):
            found = "a saved measurement" if self.reference else "none"
            return f"needs a reference set with the same ids; reference is {found}"
        if network is not None and network not in self.networks:
            return f"needs {network}=, its model or weights"
        if metric in self._comparisons:
            return self._too_few(self._comparisons[metric])
        still = self.samples.kind == "images"
        if metric == "flicker":
            short = [x for x in self.samples.ids if len(self.samples.files(x)) < 2]
            found = "these are images" if still else f"{short[:1]} has one"
            return f"needs clips of two frames; {found}" if still or short else None
        if metric == "clip_score":
            without = [x for x in self.samples.ids if x not in self.prompts]
            return f"needs prompts; sample {without[0]!r} has none" if without else None
        if metric == "judge":
            unknown = unknown_prompt(self.prompts, self.samples.ids, still=still)
            return f"needs prompts of the demo; {unknown}" if unknown else None
        return None

    def _too_few(self, comparison: Comparison) -> str | None:
        """Return why the sets do not suffice for comparing features."""
        if self.reference is None and self.need_reference:
            return "needs a reference"
        least = NEIGHBOURS + 1 if comparison.distance in ("precision", "recall") else 2
        for argument, one in (("images", self.samples), ("reference", self.reference)):
            if isinstance(one, SampleSet):
                count = sum(len(one.files(x)) for x in one.ids[:least])
                if count < least:
                    return (
                        f"needs at least {least} pictures; {argument}={str(one.path)!r} has {count}"
                    )
        if isinstance(self.reference, Measurement):
            saved, name = self.reference.features.get("samples", {}), comparison.extractor
            if name not in saved:
                return f"needs {name!r} features; reference has {', '.join(saved) or 'none'}"
            rows = len(saved[name].rows())
            if comparison.distance != "frechet" and rows < least:
                return f"needs at least {least} rows of features; reference has {rows}"
        return None


def _size(path: Path) -> str:
    """Return width x height of a picture without decoding it."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return f"{image.width}x{image.height}"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from None
