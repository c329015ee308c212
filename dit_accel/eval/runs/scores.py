"""The metrics of an evaluation, and their values for each of its sample sets."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_accel.eval.metrics.choices import ALONE, PAIRED, TINY, Given
from dit_accel.eval.metrics.measurement import Measurement
from dit_accel.eval.metrics.networks import Networks
from dit_accel.eval.metrics.score import measure, score
from dit_accel.eval.metrics.values import PARTS
from dit_accel.eval.results.types import MetricValue
from dit_accel.eval.view.definitions import FINE, TO_DENSE
from dit_accel.sampling.sets import SampleSet

Reference = SampleSet | Measurement


@dataclass(frozen=True)
class Metrics:
    """Names of metrics by the set that they compare with."""

    paired: tuple[str, ...]  # metrics that compare a sample with the dense sample of the same id
    alone: tuple[str, ...]  # metrics of a sample alone
    to_dense: tuple[str, ...]  # distances to the dense set, without the suffix `TO_DENSE`
    to_reference: tuple[str, ...]  # distances to the reference of the caller
    fine: bool = False  # whether the paired metrics also compare with a fine run

    @property
    def needed(self) -> tuple[str, ...]:
        """All names, as `score` takes them."""
        return (*self.paired, *self.alone, *self.to_dense, *self.to_reference)

    @property
    def names(self) -> tuple[str, ...]:
        """All names in results.json."""
        fine = [f"{x}{FINE}" for x in self.paired] if self.fine else []
        dense = [f"{x}{TO_DENSE}" for x in self.to_dense]
        judged = [f"judge_{x}" for x in PARTS[1:]] if "judge" in self.alone else []
        return (*self.paired, *fine, *self.alone, *dense, *self.to_reference, *judged)


def choose_metrics(
    planned: SampleSet,
    metrics: Sequence[str] | None,
    *,
    networks: Networks,
    reference: Reference | None = None,
    fine: bool = False,
) -> Metrics:
    """Return the metrics of each sample set, checked before samples are made.

    Args:
        planned: ids, prompts and numbers of frames of the samples.
        metrics: names as `score` takes them. Distances compare with `reference`, and with the dense set without a
            reference or if the name ends in "_to_dense". Default: PSNR, SSIM, metrics that the networks allow, flicker of
            clips, and for prompts of the demo the judge and fd_tiny.
        networks: weights that metrics need.
        reference: real pictures.
        fine: whether there is a fine run.

    Raises:
        ValueError: an unknown name, or a metric whose needs are not met.
    """

    def checked(names: Sequence[str], other: Reference | None) -> tuple[str, ...]:
        given = Given(planned, other, planned.prompts, networks.given)
        return tuple(given.choose(names)) if names else ()

    def default() -> list[str]:
        names = ["psnr", "ssim", *(["lpips"] if "lpips" in networks.given else [])]

        def add(name: str, other: Reference | None) -> None:
            with contextlib.suppress(ValueError):  # not for these samples, or too few samples
                names.extend(checked([name], other))

        for name in ALONE:
            add(name, None)
        if "inception" in networks.given:
            add("fid", planned)
        elif "judge" in names:
            add(f"fd_{TINY}", planned)
        return names

    names = list(dict.fromkeys(default() if metrics is None else metrics))
    if not names:
        raise ValueError("metrics=[]: must have at least one name")
    plain = [x for x in names if x in (*PAIRED, *ALONE)]
    to_dense = [x.removesuffix(TO_DENSE) for x in names if x.endswith(TO_DENSE)]
    rest = [x for x in names if x not in plain and not x.endswith(TO_DENSE)]
    if reference is None:
        to_dense, rest = list(dict.fromkeys([*to_dense, *rest])), []
    for name in to_dense:
        if name in (*PAIRED, *ALONE):
            raise ValueError(f"metrics: unknown {name + TO_DENSE!r}: must be {name!r}")
    if "lpips" in plain and "lpips" not in networks.given:
        raise ValueError("metric 'lpips' needs lpips=, the weights of the backbone")
    if reference is not None and not rest:
        raise ValueError(
            f"reference: no metric compares with it; pass inception, or metrics such as 'fd_{TINY}'"
        )
    paired = tuple(x for x in plain if x in PAIRED)  # two sets of one plan always make pairs
    if fine and not paired:
        raise ValueError(f"fine_steps: needs a paired metric, one of {', '.join(PAIRED)}")
    alone = checked([x for x in plain if x in ALONE], None)
    return Metrics(paired, alone, checked(to_dense, planned), checked(rest, reference), fine)


@dataclass
class Scorer:
    """Computes the metrics of the sample sets of one evaluation."""

    metrics: Metrics
    dense: SampleSet
    fine: SampleSet | None  # dense samples of many more steps
    reference: Reference | None
    options: dict[str, Any]  # further arguments of `score`
    _measured: dict[Path, Measurement] = field(default_factory=dict)

    def metric_values(self, samples: SampleSet) -> dict[str, MetricValue]:
        """Return the metrics of a set. The dense set is not compared with itself."""
        names = self.metrics
        dense = None if samples.path == self.dense.path else self.dense
        compared = [
            ((*(names.paired if dense else ()), *names.alone), dense, ""),
            (names.paired if self.fine else (), self.fine, FINE),
            (names.to_dense if dense else (), self._features(dense, names.to_dense), TO_DENSE),
            (names.to_reference, self._features(self.reference, names.to_reference), ""),
        ]
        found: dict[str, MetricValue] = {}
        for metrics, reference, end in compared:
            if metrics:
                made = score(samples, reference=reference, metrics=metrics, **self.options)
                found |= {f"{name}{end}": x for name, x in made.items()}
        return found

    def _features(self, of: Reference | None, metrics: Sequence[str]) -> Reference | None:
        """Return the features of a set that every row is compared with, computed once."""
        if not metrics or not isinstance(of, SampleSet):
            return of
        if of.path not in self._measured:
            self._measured[of.path] = measure(of, metrics=metrics, **self.options)
        return self._measured[of.path]
