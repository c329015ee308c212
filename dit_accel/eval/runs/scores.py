"""Which metrics an evaluation measures, and their figures for each of its sample sets."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
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
    """Names by what they need."""

    paired: tuple[str, ...]
    """Compare a sample with the dense one of the same id."""
    alone: tuple[str, ...]
    to_dense: tuple[str, ...]
    """Compare the features of a set with those of the dense set; without the suffix of their keys."""
    to_reference: tuple[str, ...]
    """Compare them with the caller's reference."""
    fine: bool = False
    """Whether the paired ones compare with a fine run too."""

    @property
    def needed(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.paired, *self.alone, *self.to_dense, *self.to_reference)

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of the figures."""
        fine = [f"{x}{FINE}" for x in self.paired] if self.fine else []
        own = [*self.paired, *fine, *self.alone, *(f"{x}{TO_DENSE}" for x in self.to_dense)]
        judged = [f"judge_{x}" for x in PARTS[1:]] if "judge" in self.alone else []
        return (*own, *self.to_reference, *judged)


def choose_metrics(
    planned: SampleSet,
    metrics: Sequence[str] | None,
    *,
    networks: Networks,
    reference: Reference | None = None,
    fine: bool = False,
) -> Metrics:
    """What to measure of each set, checked before there is one.

    Args:
        planned: ids, prompts and numbers of frames as they will be.
        metrics: names as `score` takes them; those that compare features do so with `reference`, and
            with the dense set where there is none or where the name ends in "_to_dense". None: PSNR, SSIM,
            what the networks allow, flicker of clips, and for prompts of the demo the judge and fd_tiny.

    Raises:
        ValueError: an unknown name, or one whose needs are not met.
    """

    def checked(names: Sequence[str], other: Reference | None) -> tuple[str, ...]:
        given = Given(planned, other, planned.prompts, networks.given)
        return tuple(given.choose(names)) if names else ()

    if metrics is None:
        metrics = _default(planned, networks)
    names = list(dict.fromkeys(metrics))
    if not names:
        raise ValueError("metrics=[]: accepted is at least one name")
    plain = [x for x in names if x in (*PAIRED, *ALONE)]
    to_dense = [x.removesuffix(TO_DENSE) for x in names if x.endswith(TO_DENSE)]
    rest = [x for x in names if x not in plain and not x.endswith(TO_DENSE)]
    if reference is None:
        to_dense, rest = list(dict.fromkeys([*to_dense, *rest])), []
    for name in to_dense:
        if name in (*PAIRED, *ALONE):
            raise ValueError(f"metrics: {name + TO_DENSE!r} is none; accepted is {name!r}")
    if "lpips" in plain and "lpips" not in networks.given:
        raise ValueError("metric 'lpips' needs lpips=: the backbone's weights")
    to_reference = checked(rest, reference)
    if reference is not None and not to_reference:
        raise ValueError(
            "reference: nothing compares with it; accepted with inception, or with metrics such as "
            f"'fd_{TINY}'"
        )
    paired = tuple(x for x in plain if x in PAIRED)  # two sets of one plan always make pairs
    if fine and not paired:
        raise ValueError(
            f"fine_steps: no metric compares with it; accepted with {', '.join(PAIRED)}"
        )
    return Metrics(
        paired=paired,
        alone=checked([x for x in plain if x in ALONE], None),
        to_dense=checked(to_dense, planned),
        to_reference=to_reference,
        fine=fine,
    )


def _default(planned: SampleSet, networks: Networks) -> list[str]:
    names = ["psnr", "ssim", *(["lpips"] if "lpips" in networks.given else [])]
    given = Given(planned, planned, planned.prompts, networks.given)
    demo = False
    for name in ALONE:
        with contextlib.suppress(ValueError):
            given.choose([name])
            names.append(name)
            demo = demo or name == "judge"
    distance = "fid" if "inception" in networks.given else f"fd_{TINY}" if demo else None
    if distance is not None:
        with contextlib.suppress(ValueError):  # too few samples
            given.choose([distance])
            names.append(distance)
    return names


@dataclass
class Scorer:
    """Figures of the sample sets of one evaluation."""

    metrics: Metrics
    dense: SampleSet
    fine: SampleSet | None
    """Dense samples of many more steps."""
    reference: Reference | None
    options: dict[str, Any]
    """For `measure` and `score`."""
    _measured: dict[str, Measurement] = field(default_factory=dict)

    def figures(self, samples: SampleSet) -> dict[str, MetricValue]:
        """Of a set; of the dense set what does not compare with itself."""
        own = samples.path == self.dense.path
        plain = [*([] if own else self.metrics.paired), *self.metrics.alone]
        found: dict[str, MetricValue] = {}
        if plain:
            found |= score(
                samples, reference=None if own else self.dense, metrics=plain, **self.options
            )
        if self.fine is not None:
            paired = score(
                samples, reference=self.fine, metrics=self.metrics.paired, **self.options
            )
            found |= {f"{name}{FINE}": x for name, x in paired.items()}
        if self.metrics.to_dense and not own:
            names = self.metrics.to_dense
            other = self._features("dense", self.dense, names)
            figures = score(samples, reference=other, metrics=names, **self.options)
            found |= {f"{name}{TO_DENSE}": x for name, x in figures.items()}
        if self.metrics.to_reference:
            assert self.reference is not None
            names = self.metrics.to_reference
            other = self._features("reference", self.reference, names)
            found |= score(samples, reference=other, metrics=names, **self.options)
        return found

    def _features(self, key: str, of: Reference, names: Sequence[str]) -> Measurement:
        """Of a set that every row is compared with: taken once."""
        if isinstance(of, Measurement):
            return of
        if key not in self._measured:
            self._measured[key] = measure(of, metrics=names, **self.options)
        return self._measured[key]
