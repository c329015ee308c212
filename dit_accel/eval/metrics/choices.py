"""Names of metrics, and whether what is at hand suffices for them."""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dit_accel.eval.metrics.judge import unknown_prompt
from dit_accel.eval.metrics.measurement import Comparison, Measurement, source_of
from dit_accel.sampling.sets import SampleSet, pair_ids

PAIRED = ("psnr", "ssim", "lpips")
"""Compare a sample with the reference's of the same id."""
ALONE = ("flicker", "clip_score", "judge")
INCEPTION = {
    "fid": ("frechet", "2048"),
    "fid_768": ("frechet", "768"),
    "fid_192": ("frechet", "192"),
    "fid_64": ("frechet", "64"),
    "sfid": ("frechet", "spatial"),
    "kid": ("kernel", "2048"),
    "precision": ("precision", "2048"),
    "recall": ("recall", "2048"),
}
"""What is computed of which features of FID's network; no other network's figures have these names."""
_USUAL = ("fid", "sfid", "kid", "precision", "recall")
OTHERS = {"fd": "frechet", "kd": "kernel", "precision": "precision", "recall": "recall"}
"""Before the name of another network: fd_tiny, kd_tiny, ..."""
TINY = "tiny"


@dataclass(frozen=True)
class Choice:
    """A metric to measure."""

    metric: str
    extractor: str | None = None
    """The network whose features it compares."""
    kind: str = ""
    """Which features of the network."""
    what: str = ""
    """What is computed of them."""

    @property
    def comparison(self) -> Comparison | None:
        """As a measurement stores it."""
        if self.extractor is None:
            return None
        return Comparison(self.what, source_of(self.extractor, self.kind))


def header_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture, without decoding it.

    Raises:
        ValueError: it is no picture.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from None


@dataclass(frozen=True)
class Given:
    """What is at hand."""

    samples: SampleSet
    reference: SampleSet | Measurement | None
    prompts: dict[str, str]
    """By id."""
    networks: tuple[str, ...]
    """Of "inception", "lpips", "clip"."""
    extractor: str | None = None
    """Name of the caller's own."""
    allow_partial: bool = False
    need_reference: bool = True
    """Whether metrics that compare features need something to compare with already."""
    neighbours: int = 3

    def choose(self, metrics: Sequence[str] | None) -> list[Choice]:
        """What to measure.

        Args:
            metrics: names; None for all that can be measured.

        Raises:
            ValueError: an unknown name, or one whose needs are not met.
        """
        names = self._default() if metrics is None else list(dict.fromkeys(metrics))
        if not names:
            raise ValueError(
                "metrics: nothing can be measured of this set alone; give a reference, prompts of the demo, or a "
                "CLIP model"
                if metrics is None
                else "metrics=[]: accepted is at least one name"
            )
        return [self._choice(metric) for metric in names]

    def _default(self) -> list[str]:
        """What these arguments were given for, and what needs nothing else."""
        names: list[str] = []
        paired = [x for x in PAIRED if x != "lpips" or "lpips" in self.networks]
        unpaired = self._unpaired()
        if unpaired:
            sys.stderr.write(f"note: {', '.join(paired)} left out: {unpaired}\n")
        elif isinstance(self.reference, SampleSet):
            names += paired
        if self._no_flicker() is None:
            names.append("flicker")
        if "clip" in self.networks:
            names.append("clip_score")
        if self._no_judge() is None:
            names.append("judge")
        comparing: list[str] = []
        if "inception" in self.networks:
            comparing += _USUAL
        if self.extractor is not None:
            comparing += [f"{start}_{self.extractor}" for start in OTHERS]
        if not comparing:  # the shipped network knows the demo's pictures only
            comparing += [f"{start}_{TINY}" for start in OTHERS]
        for metric in comparing:
            with contextlib.suppress(ValueError):  # no reference, or few samples
                self._choice(metric)
                names.append(metric)
        return names

    def _unpaired(self) -> str | None:
        """Why the reference set is not one of pairs, but of other pictures."""
        other = self.reference
        if not isinstance(other, SampleSet):
            return None
        if other.kind != self.samples.kind:
            return f"{self.samples.kind} against {other.kind}"
        common = sorted(set(self.samples.ids) & set(other.ids))
        if not common:
            return "no id is in both sets"
        sizes = [header_size(x.files(common[0])[0]) for x in (self.samples, other)]
        if sizes[0] != sizes[1]:
            said = [f"{width}x{height}" for width, height in sizes]
            return f"sample {common[0]!r} is {said[0]}, and {said[1]} in the reference"
        return None

    def _choice(self, metric: str) -> Choice:
        if metric in PAIRED:
            self._check_pairs(metric)
            if metric == "lpips":
                self._check_network(metric, "lpips", "the backbone's weights")
            return Choice(metric)
        if metric == "flicker":
            return self._possible(metric, self._no_flicker())
        if metric == "clip_score":
            self._check_network(metric, "clip", "a CLIP model")
            missing = [x for x in self.samples.ids if x not in self.prompts]
            if missing:
                raise ValueError(
                    f"metric 'clip_score' needs a prompt of each sample; {len(missing)} have none, {missing[0]!r} "
                    "the first"
                )
            return Choice(metric)
        if metric == "judge":
            return self._possible(metric, self._no_judge())
        choice = self._comparing(metric)
        self._check_comparison(choice)
        return choice

    def _possible(self, metric: str, why_not: str | None) -> Choice:
        if why_not is not None:
            raise ValueError(f"metric {metric!r}: {why_not}")
        return Choice(metric)

    def _comparing(self, metric: str) -> Choice:
        if metric in INCEPTION:
            self._check_network(metric, "inception", "FID's local Inception weights")
            what, kind = INCEPTION[metric]
            return Choice(metric, "inception", kind, what)
        start, _, name = metric.partition("_")
        own = [x for x in (self.extractor, TINY) if x is not None]
        if start in OTHERS and name in own:
            return Choice(metric, name, "", OTHERS[start])
        named = [f"{start}_{name}" for name in own for start in OTHERS]
        accepted = ", ".join([*PAIRED, *ALONE, *INCEPTION, *named])
        raise ValueError(f"metrics: {metric!r} is none; accepted are {accepted}")

    def _check_network(self, metric: str, network: str, what: str) -> None:
        if network not in self.networks:
            raise ValueError(f"metric {metric!r} needs {network}=: {what}")

    def _check_pairs(self, metric: str) -> None:
        if not isinstance(self.reference, SampleSet):
            found = "a saved measurement" if self.reference else "none"
            raise ValueError(
                f"metric {metric!r} needs a reference set with the same ids; reference is {found}"
            )
        _ = self.pairs

    @cached_property
    def pairs(self) -> tuple[str, ...]:
        """Ids to compare one by one.

        Raises:
            ValueError: ids that differ, or pairs that differ in length or, by their first frames, in size.
        """
        if not isinstance(self.reference, SampleSet):
            return ()
        ids = pair_ids(self.samples, self.reference, allow_partial=self.allow_partial)
        for name in ids:
            files = self.samples.files(name), self.reference.files(name)
            shapes = [(len(x), *header_size(x[0])) for x in files]
            if shapes[0] != shapes[1]:
                said = [f"{count} of {width}x{height}" for count, width, height in shapes]
                raise ValueError(
                    f"sample {name!r}: {said[0]} in {self.samples.path} and {said[1]} in {self.reference.path}; "
                    "accepted are as many frames of the same size"
                )
        return ids

    def _no_judge(self) -> str | None:
        still = self.samples.kind == "images"
        return unknown_prompt(self.prompts, self.samples.ids, still=still)

    def _no_flicker(self) -> str | None:
        if self.samples.kind == "images":
            return "images do not flicker"
        short = [x for x in self.samples.ids if len(self.samples.files(x)) < 2]
        return f"clip {short[0]!r} has a single frame" if short else None

    def _check_comparison(self, choice: Choice) -> None:
        least = self.neighbours + 1 if choice.what in ("precision", "recall") else 2
        sets = {"images": self.samples, "reference": self.reference}
        for argument, one in sets.items():
            if isinstance(one, SampleSet):
                count = sum(len(one.files(x)) for x in one.ids[:least])
                if count < least:
                    raise ValueError(
                        f"{argument}={str(one.path)!r}: {count} pictures; metric {choice.metric!r} accepts at "
                        f"least {least}"
                    )
        if self.reference is None and self.need_reference:
            raise ValueError(f"metric {choice.metric!r} needs a reference")
        assert choice.comparison is not None
        if isinstance(self.reference, Measurement):
            saved = self.reference.features.get("samples", {})
            if choice.comparison.source not in saved:
                raise ValueError(
                    f"reference: the saved measurement has no {choice.comparison.source!r} features for metric "
                    f"{choice.metric!r}; it has {', '.join(saved) or 'none'}"
                )
            rows = len(saved[choice.comparison.source].rows())
            if choice.what != "frechet" and rows < least:
                raise ValueError(
                    f"reference: the saved measurement kept {rows} rows of features, and metric "
                    f"{choice.metric!r} accepts at least {least}; measure it with that metric"
                )
