"""`--fail-if "psnr<25"`: conditions on results, for use in CI."""

import math
import operator
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dit_accel.eval.results.types import (
    ACCELERATED,
    PHASES,
    SPEEDUPS,
    MetricValue,
    Results,
    Row,
    identical,
    reference_row,
)
from dit_accel.eval.view.cells import number
from dit_accel.eval.view.definitions import METRICS, definition
from dit_accel.eval.view.table import metric_keys

OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
COUNTED = (
    *(f"seconds_{phase}" for phase in PHASES),
    *(f"speedup_{phase}" for phase in SPEEDUPS),
    "peak_memory_bytes",
    "density",
    "cost",
)
"""What a condition may name besides metrics."""
_FAMILIES = {x.partition("_")[0] for x in METRICS}
_FEWER = re.compile(r"Dense, \d+ steps?")
_GRAMMAR = re.compile(
    r"\s*(?:(?P<row>.+):)?\s*(?P<metric>[\w./-]+)\s*(?P<sign><=|>=|<|>)\s*"
    r"(?P<limit>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*",
    re.DOTALL,
)


@dataclass(frozen=True)
class Condition:
    """`[row:]metric sign number`, taken apart."""

    text: str
    row: str | None
    metric: str
    sign: str
    limit: float
    shown: str
    """The number as it was written."""

    def holds(self, value: float) -> bool:
        """That is, whether to fail."""
        return OPERATORS[self.sign](value, self.limit)

    def reason(self, value: float) -> str:
        """What to say if it holds."""
        found = "identical" if math.isinf(value) else _shown(value)
        return f"{self.metric} is {found}, fails {self.sign} {self.shown}"


def parse(condition: str) -> Condition:
    """Raises ValueError if it is not of the form."""
    found = _GRAMMAR.fullmatch(condition)
    if found is None:
        raise ValueError(
            f"fail_if={condition!r}: accepted is [row:]metric, one of <, <=, >, >=, and a number, "
            'as in "psnr<25"'
        )
    row = found["row"]
    return Condition(
        condition,
        None if row is None else row.strip(),
        found["metric"],
        found["sign"],
        float(found["limit"]),
        found["limit"],
    )


def check_early(
    conditions: Sequence[str],
    *,
    metrics: Collection[str] | None = None,
    rows: Collection[str] | None = None,
) -> None:
    """What can be checked before there are results.

    Args:
        metrics: that will be measured, where they are known.
        rows: names and methods of rows that will have figures; those of dense sampling with fewer steps are
            known only later.

    Raises:
        ValueError: not of the form, or on a figure or a row that there will not be.
    """
    for condition in map(parse, conditions):
        metric, row = condition.metric, condition.row
        if metrics is not None and metric not in (*metrics, *COUNTED):
            raise ValueError(
                f"fail_if={condition.text!r}: there will be no figure {metric!r}; accepted are "
                f"{', '.join([*metrics, *COUNTED])}"
            )
        if rows is not None and row is not None and row not in rows and not _FEWER.fullmatch(row):
            raise ValueError(
                f"fail_if={condition.text!r}: there will be no row {row!r} with figures; accepted are "
                f"{', '.join(rows)}"
            )
        if metric not in COUNTED and metric.partition("_")[0] not in _FAMILIES:
            raise ValueError(
                f"fail_if={condition.text!r}: there is no figure {metric!r}; accepted are metrics such as "
                f"psnr, and {', '.join(COUNTED)}"
            )


def check(results: Results, conditions: Sequence[str]) -> list[str]:
    """The conditions that hold, that is, the reasons to fail.

    A condition is `[row:]metric sign number`: `psnr<25`, `SLA balanced: seconds_total >= 4`. The row
    is a name, or a method for all of its rows; without one, every available accelerated row counts.
    Point estimates are compared; PSNR of identical pairs is infinite.

    Raises:
        ValueError: not of this form, an unknown row or metric, or a figure without a value, which is
            never taken for a pass. Nothing is returned in this case.
    """
    breached = []
    known = [*metric_keys(results), *COUNTED]
    for condition in map(parse, conditions):
        if condition.metric not in known:
            raise ValueError(
                f"fail_if={condition.text!r}: there is no figure {condition.metric!r} here; accepted are "
                f"{', '.join(known)}"
            )
        for row in _rows(results, condition.row, condition.text):
            if row is reference_row(results) and definition(condition.metric).of_reference:
                raise ValueError(
                    f"fail_if={condition.text!r}: row {row['name']!r} is what {condition.metric} compares with"
                )
            value = _value(row, condition.metric, condition.text)
            if condition.holds(value):
                breached.append(f"{row['name']}: {condition.reason(value)}")
    return breached


def check_figures(figures: Mapping[str, MetricValue], conditions: Sequence[str]) -> list[str]:
    """The same for the figures of one set; a condition that names a row is an error."""
    breached = []
    for condition in map(parse, conditions):
        if condition.row is not None or condition.metric not in figures:
            raise ValueError(
                f"fail_if={condition.text!r}: accepted are conditions on {', '.join(figures)}"
            )
        value = _figure(figures[condition.metric], condition.metric, condition.text)
        if condition.holds(value):
            breached.append(condition.reason(value))
    return breached


def _rows(results: Results, name: str | None, condition: str) -> list[Row]:
    rows = results["rows"]
    if name is None:
        chosen = [row for row in rows if row["method"] in ACCELERATED and row["available"]]
        if not chosen:
            raise ValueError(
                f"fail_if={condition!r}: no accelerated row is available; name a row to check another"
            )
        return chosen
    chosen = [row for row in rows if row["name"] == name]
    chosen = chosen or [row for row in rows if row["method"] == name]
    if not chosen:
        accepted = ", ".join(repr(row["name"]) for row in rows)
        raise ValueError(f"fail_if={condition!r}: no row {name!r}; accepted are {accepted}")
    for row in chosen:
        if not row["available"]:
            raise ValueError(
                f"fail_if={condition!r}: row {row['name']!r} is not available ({row['why']})"
            )
    return chosen


def _value(row: Row, metric: str, condition: str) -> float:
    if metric in row["metrics"]:
        return _figure(row["metrics"][metric], f"{metric} of row {row['name']!r}", condition)
    value: float | None
    if metric.startswith("seconds_"):
        phase = row["seconds"].get(metric.removeprefix("seconds_"))
        value = None if phase is None else phase["median"]
    elif metric.startswith("speedup_"):
        value = None if row["speedup"] is None else row["speedup"][metric.removeprefix("speedup_")]
    else:
        value = row.get(metric)  # type: ignore[assignment]
    return _known(value, f"{metric} of row {row['name']!r}", "it was not measured", condition)


def _figure(figure: MetricValue, name: str, condition: str) -> float:
    value = math.inf if identical(figure) else figure["value"]
    return _known(value, name, figure.get("why", "it was not measured"), condition)


def _known(value: float | int | None, name: str, why: str, condition: str) -> float:
    if value is None:
        raise ValueError(f"fail_if={condition!r}: {name} has no value ({why})")
    return float(value)


def _shown(value: float) -> str:
    return f"{value:.6g}" if abs(value) < 1e6 else number(value, 0)
