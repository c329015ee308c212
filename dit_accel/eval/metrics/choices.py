"""Names of metrics, what each one needs, and whether the given sets, prompts and networks suffice."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dit_accel.eval.metrics.distances import NEIGHBOURS
from dit_accel.eval.metrics.features import TINY
from dit_accel.eval.metrics.judge import unknown_prompt
from dit_accel.eval.metrics.measurement import Comparison, Measurement
from dit_accel.sampling.sets import SampleSet, pair_ids

PAIRED = ("psnr", "ssim", "lpips")
"""Metrics that compare a sample with the reference's sample of the same id."""
ALONE = ("flicker", "clip_score", "judge")
"""Metrics that need no reference."""
INCEPTION = {
    "fid": Comparison("frechet", "inception:2048"),
    "fid_768": Comparison("frechet", "inception:768"),
    "fid_192": Comparison("frechet", "inception:192"),
    "fid_64": Comparison("frechet", "inception:64"),
    "sfid": Comparison("frechet", "inception:spatial"),
    "kid": Comparison("kernel", "inception:2048"),
    "precision": Comparison("precision", "inception:2048"),
    "recall": Comparison("recall", "inception:2048"),
}
"""Metrics of FID's network; no other network's metrics have these names."""
_USUAL = ("fid", "sfid", "kid", "precision", "recall")
_DISTANCES = {"fd": "frechet", "kd": "kernel", "precision": "precision", "recall": "recall"}
"""Distances of other networks by prefix: fd_tiny, kd_tiny, ..."""
_WEIGHTS = {
    "inception": "FID's local Inception weights",
    "lpips": "the backbone's weights",
    "clip": "a CLIP model",
}


@dataclass(frozen=True)
class Given:
    """Sets, prompts and networks that a caller passes."""

    samples: SampleSet
    reference: SampleSet | Measurement | None
    prompts: dict[str, str]
    """Prompts by sample id."""
    networks: tuple[str, ...]
    """Networks with weights: "inception", "lpips", "clip"."""
    extractor: str | None = None
    """Name of the caller's own extractor."""
    allow_partial: bool = False
    need_reference: bool = True
    """Refuse metrics that compare features when there is no reference yet."""

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
                "metrics: nothing can be measured of this set alone; give a reference, prompts of the demo, or a "
                "CLIP model"
                if metrics is None
                else "metrics=[]: accepted is at least one name"
            )
        for name in names:
            if (missing := self._missing(name)) is not None:
                raise ValueError(f"metric {name!r} {missing}")
        if set(names) & set(PAIRED):
            _ = self.pairs
        return {name: self._comparisons.get(name) for name in names}

    def _default(self) -> list[str]:
        """Return the metrics that the arguments were given for, and those that need nothing else."""
        paired = [x for x in PAIRED if x != "lpips" or "lpips" in self.networks]
        if unpaired := self._unpaired():
            sys.stderr.write(f"note: {', '.join(paired)} left out: {unpaired}\n")
            paired = []
        alone = [x for x in ALONE if x == "clip_score" or self._missing(x) is None]
        if "clip" not in self.networks:
            alone.remove("clip_score")
        comparing = [*_USUAL] if "inception" in self.networks else []
        # The shipped network knows the demo's pictures only.
        if self.extractor is not None or not comparing:
            comparing += [f"{prefix}_{self.extractor or TINY}" for prefix in _DISTANCES]
        possible = [x for x in comparing if self._missing(x) is None]
        return [*(paired if isinstance(self.reference, SampleSet) else []), *alone, *possible]

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
        """Ids of the samples to compare one by one.

        Raises:
            ValueError: ids differ, or the samples of a pair differ in length or in the size of the first frame.
        """
        assert isinstance(self.reference, SampleSet)
        ids = pair_ids(self.samples, self.reference, allow_partial=self.allow_partial)
        for name in ids:
            files = [x.files(name) for x in (self.samples, self.reference)]
            found = [f"{len(x)} of {_size(x[0])}" for x in files]
            if found[0] != found[1]:
                raise ValueError(
                    f"sample {name!r}: {found[0]} in {self.samples.path} and {found[1]} in "
                    f"{self.reference.path}; accepted are as many frames of the same size"
                )
        return ids

    @cached_property
    def _comparisons(self) -> dict[str, Comparison]:
        """All metrics that compare features."""
        out = dict(INCEPTION)
        for name in (self.extractor, TINY):
            if name is not None:
                out |= {f"{k}_{name}": Comparison(x, name) for k, x in _DISTANCES.items()}
        return out

    def _missing(self, metric: str) -> str | None:
        """Return why a metric cannot be measured, as the end of a sentence; None if it can."""
        comparison = self._comparisons.get(metric)
        if metric not in (*PAIRED, *ALONE) and comparison is None:
            accepted = ", ".join([*PAIRED, *ALONE, *self._comparisons])
            return f"is unknown; accepted are {accepted}"
        network = {"lpips": "lpips", "clip_score": "clip"}.get(metric)
        if comparison is not None and metric in INCEPTION:
            network = "inception"
        if metric in PAIRED and not isinstance(self.reference, SampleSet):
            found = "a saved measurement" if self.reference else "none"
            return f"needs a reference set with the same ids; reference is {found}"
        if network is not None and network not in self.networks:
            return f"needs {network}=: {_WEIGHTS[network]}"
        if metric == "flicker":
            if self.samples.kind == "images":
                return "needs clips; images do not flicker"
            short = [x for x in self.samples.ids if len(self.samples.files(x)) < 2]
            return f"needs two frames; clip {short[0]!r} has one" if short else None
        if metric == "clip_score":
            without = [x for x in self.samples.ids if x not in self.prompts]
            return f"needs prompts; sample {without[0]!r} has none" if without else None
        if metric == "judge":
            still = self.samples.kind == "images"
            unknown = unknown_prompt(self.prompts, self.samples.ids, still=still)
            return f"needs prompts of the demo; {unknown}" if unknown else None
        return None if comparison is None else self._too_few(comparison)

    def _too_few(self, comparison: Comparison) -> str | None:
        """Return why the sets do not suffice for comparing features."""
        if self.reference is None and self.need_reference:
            return "needs a reference"
        least = NEIGHBOURS + 1 if comparison.distance in ("precision", "recall") else 2
        for argument, one in (("images", self.samples), ("reference", self.reference)):
            if isinstance(one, SampleSet):
                count = sum(len(one.files(x)) for x in one.ids[:least])
                if count < least:
                    return f"accepts at least {least} pictures; {argument}={str(one.path)!r} has {count}"
        if isinstance(self.reference, Measurement):
            saved = self.reference.features.get("samples", {})
            if comparison.source not in saved:
                return f"needs {comparison.source!r} features; the saved reference has {', '.join(saved) or 'none'}"
            rows = len(saved[comparison.source].rows())
            if comparison.distance != "frechet" and rows < least:
                return f"needs at least {least} rows of features; the saved reference has {rows}"
        return None


def _size(path: Path) -> str:
    """Return width x height of a picture without decoding it."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return f"{image.width}x{image.height}"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from None
