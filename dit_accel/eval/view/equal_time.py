"""Against dense sampling with fewer steps in the same time: the comparison that decides.

Whoever wants a faster run can always take fewer steps. So each accelerated row is held against the
line through the dense runs with fewer steps (and the reference, where the metric has a value for
it), interpolated at the row's own time, or against a quicker dense run where that is better. Prompts
and seeds are the same in all rows, so where figures carry the values of single samples it is their
differences that are judged.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dit_accel.eval.metrics.values import bootstrap_interval
from dit_accel.eval.results.types import (
    ACCELERATED,
    MetricValue,
    Phase,
    Results,
    Row,
    reference_row,
)
from dit_accel.eval.view.cells import Cell, figure_cell, number, places, seconds_cell, short
from dit_accel.eval.view.definitions import Definition, definition

NEAR = 0.1
"""Off the line, a dense run whose seconds differ by this share at most stands in for it."""
PAIRS = 6
"""Fewer cannot decide: chance alone makes 5 differences of one sign in 1 of 16 cases."""
Verdict = Literal["better", "worse", "undecided", "few", "mixed", "overlap", "open", "unknown"]


@dataclass(frozen=True)
class Comparison:
    """One accelerated row at its own time."""

    name: str
    method: str
    verdict: Verdict
    """"undecided" where the 95 % interval of the differences holds 0, or seconds are those of the reference
    to within their spread; "few" with fewer than `PAIRS` differences; "mixed" where means leave identical pairs
    out; of figures without values of single samples "overlap" where their own intervals do, and "open" where
    they have none; "unknown" where no dense run took this time."""
    difference: str
    """Signed, in the metric's unit; empty where nothing can be said."""
    basis: str
    """What it was compared with, or why it could not be."""
    interval: str = ""
    """Of the difference."""


@dataclass(frozen=True)
class DensePoint:
    """A dense run with a value."""

    seconds: float
    value: float
    interval: tuple[float, float] | None
    steps: str
    values: Mapping[str, float] | None = None
    """By sample; None if one has none."""
    mixed: bool = False
    """Whether the value leaves identical pairs out: it then says little about the run."""


def equal_time(results: Results, metric: str, phase: str) -> list[Comparison]:
    """Each available accelerated row that has a value, against dense sampling in the same time.

    Args:
        metric: a key of `metrics`.
        phase: of the seconds, "denoise" or "total".
    """
    line = dense_line(results, metric, phase)
    reference = reference_row(results)["seconds"].get(phase)
    limit = None if reference is None else float(reference["median"])
    out = []
    for row in results["rows"]:
        figure, took = row["metrics"].get(metric), row["seconds"].get(phase)
        if row["method"] not in ACCELERATED or figure is None or took is None:
            continue
        cell = figure_cell(figure, definition(metric))
        if cell.value is None:
            continue
        seconds, who = float(took["median"]), (row["name"], row["method"])
        if math.isinf(cell.value):
            out.append(_identical(row, took, reference))
        elif (
            definition(metric).of_reference
            and reference is not None
            and seconds >= reference["median"]
        ):
            basis = f"the reference itself takes {_took(float(reference['median']))}"
            out.append(
                Comparison(*who, "worse" if _longer(took, reference) else "undecided", "", basis)
            )
        else:
            dense, basis = _best(line, *_at(line, seconds, limit), seconds, metric)
            out.append(_compare(row, cell, dense, basis, metric))
    return out


def _best(
    line: list[DensePoint], dense: DensePoint | None, basis: str, seconds: float, metric: str
) -> tuple[DensePoint | None, str]:
    """The line at a time, or a dense run that takes less and is better: more steps are not always better, and
    nobody has to use up the time."""
    sign = {"higher": 1, "lower": -1, None: 0}[definition(metric).better]
    quicker = [x for x in line if x.seconds <= seconds and not x.mixed]
    best = max(quicker, key=lambda x: sign * x.value, default=None)
    if best is None or dense is None or dense.mixed or sign * best.value <= sign * dense.value:
        return dense, basis
    return best, _ran(best, seconds)


def _identical(row: Row, took: Phase, reference: Phase | None) -> Comparison:
    """A row that made the reference's very samples: time decides."""
    who, same = (row["name"], row["method"]), "identical to the reference"
    if reference is None:
        return Comparison(*who, "unknown", same, "its seconds are not known")
    verdict: Verdict = "undecided"
    if _longer(reference, took):
        verdict = "better"
    elif _longer(took, reference):
        verdict = "worse"
    basis = f"the reference itself takes {_took(float(reference['median']))}"
    return Comparison(*who, verdict, same, basis)


def _longer(a: Phase, b: Phase) -> bool:
    """Whether a takes longer than b by more than the spread of both; one call has none, and tells nothing."""
    return min(a["n"], b["n"]) > 1 and a["iqr"][0] > b["iqr"][1]


def dense_line(results: Results, metric: str, phase: str) -> list[DensePoint]:
    """Dense runs with a finite value, by seconds."""
    points = []
    for row in results["rows"]:
        figure = row["metrics"].get(metric)
        if row["method"] in ACCELERATED or figure is None or phase not in row["seconds"]:
            continue
        if figure["value"] is not None:
            interval = figure["interval_95"]
            points.append(
                DensePoint(
                    float(row["seconds"][phase]["median"]),
                    float(figure["value"]),
                    None if interval is None else (float(interval[0]), float(interval[1])),
                    str(row["num_inference_steps"]),
                    _single(figure),
                    bool(figure.get("infinite")),
                )
            )
    return sorted(points, key=lambda point: point.seconds)


def _compare(row: Row, cell: Cell, dense: DensePoint | None, basis: str, metric: str) -> Comparison:
    about, figure = definition(metric), row["metrics"][metric]
    who = row["name"], row["method"]
    if dense is None or cell.value is None:
        return Comparison(*who, "unknown", "", basis)
    if dense.mixed or figure.get("infinite"):
        return Comparison(*who, "mixed", "", basis)
    difference = cell.value - dense.value
    text = number(difference, places(cell.value, about), signed=True)
    text = f"{text} {short(figure['unit'])}".strip()
    single = _single(figure)
    if about.better and single and dense.values and single.keys() == dense.values.keys():
        return _paired(row, single, dense.values, about, text, basis)
    mine, other = figure["interval_95"], dense.interval
    if about.better is None or mine is None or other is None:
        return Comparison(*who, "open", text, basis)
    if mine[0] <= other[1] and other[0] <= mine[1]:
        return Comparison(*who, "overlap", text, basis)
    wins = (difference > 0) == (about.better == "higher")
    return Comparison(*who, "better" if wins else "worse", text, basis)


def _paired(
    row: Row,
    single: Mapping[str, float],
    dense: Mapping[str, float],
    about: Definition,
    text: str,
    basis: str,
) -> Comparison:
    """By the differences of single samples."""
    who = row["name"], row["method"]
    differences = [single[key] - dense[key] for key in sorted(single)]
    interval = bootstrap_interval(differences) if len(differences) >= PAIRS else None
    if interval is None:
        return Comparison(*who, "few", text, basis)
    digits = places(sum(differences) / len(differences), about)
    low, high = (number(x, digits, signed=True) for x in interval)
    verdict: Verdict = "undecided"
    if not interval[0] <= 0 <= interval[1]:
        wins = (interval[0] > 0) == (about.better == "higher")
        verdict = "better" if wins else "worse"
    return Comparison(*who, verdict, text, basis, f"[{low}, {high}]")


def _single(figure: MetricValue) -> dict[str, float] | None:
    """The values of all samples; None where they are not known or not all finite."""
    values = {key: x for key, x in figure.get("values", {}).items() if x is not None}
    return values if values and len(values) == figure["n"] else None


def _at(
    line: list[DensePoint], seconds: float, limit: float | None
) -> tuple[DensePoint | None, str]:
    """The line at a time, and how it was found."""
    for a, b in itertools.pairwise(line):
        if a.seconds <= seconds <= b.seconds and a.seconds < b.seconds:
            share = (seconds - a.seconds) / (b.seconds - a.seconds)
            interval = None
            if a.interval is not None and b.interval is not None:
                interval = (
                    _mix(a.interval[0], b.interval[0], share),
                    _mix(a.interval[1], b.interval[1], share),
                )
            values = None
            if a.values and b.values and a.values.keys() == b.values.keys():
                values = {key: _mix(x, b.values[key], share) for key, x in a.values.items()}
            steps = f"{a.steps} to {b.steps}"
            point = DensePoint(
                seconds, _mix(a.value, b.value, share), interval, steps, values, a.mixed or b.mixed
            )
            return point, f"dense with {steps} steps, interpolated"
    if not line:
        return None, "no dense run with fewer steps has this figure"
    nearest = min(line, key=lambda point: abs(point.seconds - seconds))
    # Who has more time than the reference needs can still take the reference.
    slower = limit is not None and seconds >= line[-1].seconds >= limit
    if slower or abs(nearest.seconds - seconds) <= NEAR * seconds:
        return nearest, _ran(nearest, seconds)
    return None, f"no dense run takes about {_took(seconds)}"


def _ran(dense: DensePoint, seconds: float) -> str:
    took = f"in {_took(dense.seconds)}, this row in {_took(seconds)}"
    return f"dense with {dense.steps} steps {took}"


def _mix(a: float, b: float, share: float) -> float:
    return a + share * (b - a)


def _took(seconds: float) -> str:
    return seconds_cell({"median": seconds, "iqr": [seconds, seconds], "n": 1}).text + " s"
