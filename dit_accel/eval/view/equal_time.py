"""Comparison with dense sampling with fewer steps in the same time.

Fewer steps are the free way to a faster run. Each accelerated row is therefore compared with the line through the dense
runs, interpolated at the row's own time, or with a quicker dense run if that one is better. All rows have the same
prompts and noise, so the values of single samples are compared in pairs.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dit_accel.eval.metrics.values import bootstrap_interval
from dit_accel.eval.results import types
from dit_accel.eval.results.types import MetricValue, Phase, Results
from dit_accel.eval.view.cells import number, places, seconds_cell, short
from dit_accel.eval.view.definitions import Definition, definition

NEAR = 0.1
"""Largest share by which the seconds of a dense run may differ if it stands in for the line."""
PAIRS = 6
"""Fewest differences that decide: 5 differences have one sign by chance in 1 of 16 cases."""
Verdict = Literal["better", "worse", "undecided", "few", "mixed", "open", "unknown"]
VERDICTS: dict[Verdict, str] = {
    "better": "better",
    "worse": "worse",
    "undecided": "not decided",  # the interval holds 0, or the seconds differ by less than their quartiles
    "few": "too few samples to tell",
    "mixed": "identical pairs have no finite value",
    "open": "no interval of the difference",  # no values of single samples
    "unknown": "not comparable",  # no dense run took about this time
}
"""Text of each verdict."""


@dataclass(frozen=True)
class Comparison:
    """An accelerated row against dense sampling in the same time."""

    name: str
    method: str
    verdict: Verdict
    basis: str  # the dense run, or the reason why there is none
    difference: str = ""  # signed difference with its unit; empty if none can be given
    interval: str = ""  # 95 % interval of the difference


@dataclass(frozen=True)
class DensePoint:
    """A dense run, or a point on the line between two."""

    seconds: float
    value: float
    steps: str
    values: Mapping[str, float] | None  # values by sample; None if a sample has none
    mixed: bool  # whether the value leaves identical pairs out


def equal_time(results: Results, metric: str, phase: str) -> list[Comparison]:
    """Compare each available accelerated row that has a value of `metric`, by the seconds of `phase`."""
    about, line = definition(metric), dense_line(results, metric, phase)
    reference = types.reference_row(results)["seconds"].get(phase)
    out = []
    for row in results["rows"]:
        found, took = row["metrics"].get(metric), row["seconds"].get(phase)
        if row["method"] not in types.ACCELERATED or found is None or took is None:
            continue
        who, same = (row["name"], row["method"]), types.identical(found)
        if found["value"] is None and not same:
            continue
        slower = reference is not None and took["median"] >= reference["median"]
        if same or (about.of_reference and slower):  # the seconds decide
            out.append(Comparison(*who, *_by_time(took, reference, same)))
        else:
            limit = None if reference is None else float(reference["median"])
            dense, basis = _dense_at(line, float(took["median"]), limit, about)
            out.append(Comparison(*who, *_by_quality(found, dense, basis, about)))
    return out


def dense_line(results: Results, metric: str, phase: str) -> list[DensePoint]:
    """Return the dense runs with a finite value, by seconds."""
    points = []
    for row in results["rows"]:
        found, took = row["metrics"].get(metric), row["seconds"].get(phase)
        if row["method"] in types.ACCELERATED or not found or not took:
            continue
        if found["value"] is not None:
            seconds, value = float(took["median"]), float(found["value"])
            steps, mixed = str(row["num_inference_steps"]), bool(found.get("infinite"))
            points.append(DensePoint(seconds, value, steps, _single(found), mixed))
    return sorted(points, key=lambda point: point.seconds)


def _by_time(took: Phase, reference: Phase | None, same: bool) -> tuple[Any, ...]:
    """Compare a row with the reference itself (identical samples, or a longer time); return fields of `Comparison`."""
    difference = "identical to the reference" if same else ""
    if reference is None:
        return "unknown", "its seconds are not known", difference

    def longer(a: Phase, b: Phase) -> bool:
        # Beyond the spread of both. A single call has no spread and decides nothing.
        return min(a["n"], b["n"]) > 1 and a["iqr"][0] > b["iqr"][1]

    verdict: Verdict = "worse" if longer(took, reference) else "undecided"
    verdict = "better" if same and longer(reference, took) else verdict
    return verdict, f"the reference itself takes {_took(reference['median'])}", difference


def _dense_at(
    line: list[DensePoint], seconds: float, limit: float | None, about: Definition
) -> tuple[DensePoint | None, str]:
    """Return the dense point to compare with at a row's seconds, and its description.

    A row that is slower than `limit`, the seconds of the reference, is compared with the slowest dense run.
    """
    if not line:
        return None, "no dense run with fewer steps has this metric"

    def ran(x: DensePoint) -> tuple[DensePoint, str]:
        took = f"in {_took(x.seconds)}, this row in {_took(seconds)}"
        return x, f"dense with {x.steps} steps {took}"

    for a, b in itertools.pairwise(line):
        if a.seconds <= seconds <= b.seconds and a.seconds < b.seconds:
            dense = _between(a, b, seconds)
            basis = f"dense with {dense.steps} steps, interpolated"
            break
    else:
        dense, basis = ran(min(line, key=lambda point: abs(point.seconds - seconds)))
        slower = limit is not None and seconds >= line[-1].seconds >= limit
        if not slower and abs(dense.seconds - seconds) > NEAR * seconds:
            return None, f"no dense run takes about {_took(seconds)}"
    # More steps are not always better, and nobody must use up the time.
    sign = {"higher": 1, "lower": -1, None: 0}[about.better]
    quicker = [x for x in line if x.seconds <= seconds and not x.mixed]
    best = max(quicker, key=lambda x: sign * x.value, default=dense)
    return (dense, basis) if dense.mixed or sign * best.value <= sign * dense.value else ran(best)


def _between(a: DensePoint, b: DensePoint, seconds: float) -> DensePoint:
    """Return the point on the line from `a` to `b` at a time."""
    share = (seconds - a.seconds) / (b.seconds - a.seconds)
    values = None
    if a.values and b.values and a.values.keys() == b.values.keys():
        values = {key: x + share * (b.values[key] - x) for key, x in a.values.items()}
    value, steps = a.value + share * (b.value - a.value), f"{a.steps} to {b.steps}"
    return DensePoint(seconds, value, steps, values, a.mixed or b.mixed)


def _by_quality(
    metric: MetricValue, dense: DensePoint | None, basis: str, about: Definition
) -> tuple[Any, ...]:
    """Compare the values of single samples in pairs; return fields of `Comparison`."""
    value, single = metric["value"], _single(metric)
    if dense is None or value is None:
        return "unknown", basis, "", ""
    if dense.mixed or metric.get("infinite"):
        return "mixed", basis, "", ""
    text = number(value - dense.value, places(value, about), signed=True)
    text = f"{text} {short(metric['unit'])}".strip()
    if not (about.better and single and dense.values and single.keys() == dense.values.keys()):
        return "open", basis, text, ""
    differences = [single[key] - dense.values[key] for key in sorted(single)]
    interval = bootstrap_interval(differences) if len(differences) >= PAIRS else None
    if interval is None:
        return "few", basis, text, ""
    digits = places(sum(differences) / len(differences), about)
    shown = "[{}, {}]".format(*(number(x, digits, signed=True) for x in interval))
    if interval[0] <= 0 <= interval[1]:
        return "undecided", basis, text, shown
    wins = (interval[0] > 0) == (about.better == "higher")
    return "better" if wins else "worse", basis, text, shown


def _single(metric: MetricValue) -> dict[str, float] | None:
    """Return the values of all samples; None if they are not known or not all finite."""
    values = {key: x for key, x in metric.get("values", {}).items() if x is not None}
    return values if values and len(values) == metric["n"] else None


def _took(seconds: int | float) -> str:
    return seconds_cell({"median": seconds, "iqr": [seconds, seconds], "n": 1}).text + " s"
