"""Conditions on results, such as `--fail-if "psnr<25"`, for use in CI."""

import math
import operator
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dit_accel.eval.results import types
from dit_accel.eval.results.types import MetricValue, Results, Row, identical, reference_row
from dit_accel.eval.view.cells import number
from dit_accel.eval.view.definitions import METRICS, definition
from dit_accel.eval.view.table import metric_keys

OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
COUNTED = (
    *(f"seconds_{phase}" for phase in types.PHASES),
    *(f"speedup_{phase}" for phase in types.SPEEDUPS),
    *("peak_memory_bytes", "density", "cost"),
)
"""Measurements that a condition may name, besides metrics."""
_FAMILIES = {x.partition("_")[0] for x in METRICS}
_FEWER = re.compile(r"Dense, \d+ steps?")
_GRAMMAR = re.compile(
    r"\s*(?:(?P<row>.+):)?\s*(?P<metric>[\w./-]+)\s*(?P<sign><=|>=|<|>)\s*"
    r"(?P<limit>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*",
    re.DOTALL,
)


@dataclass(frozen=True)
class Condition:
    """Parts of `[row:]metric sign number`."""

    text: str
    row: str | None
    metric: str
    sign: str
    limit: str

    def error(self, why: str) -> ValueError:
        """Return the error for a condition that cannot be decided."""
        return ValueError(f"fail_if={self.text!r}: {why}")

    def breach(self, value: float | int | None, why: str, of: str = "") -> list[str]:
        """Return a line of text if the condition holds. A missing value is an error, never a pass."""
        if value is None:
            raise self.error(f"{self.metric}{of} has no value ({why})")
        if not OPERATORS[self.sign](value, float(self.limit)):
            return []
        shown = f"{value:.6g}" if abs(value) < 1e6 else number(value, 0)
        shown = "identical" if math.isinf(value) else shown
        return [f"{self.metric} is {shown}, fails {self.sign} {self.limit}"]


def parse(condition: str) -> Condition:
    """Return the parts of a condition; raise ValueError if it does not have the form."""
    found = _GRAMMAR.fullmatch(condition)
    if found is None:
        raise ValueError(
            f"fail_if={condition!r}: must be [row:]metric, one of <, <=, >, >=, and a number"
        )
    row = found["row"] and found["row"].strip()
    return Condition(condition, row, found["metric"], found["sign"], found["limit"])


def check_early(
    conditions: Sequence[str],
    *,
    metrics: Collection[str] | None = None,
    rows: Collection[str] | None = None,
) -> None:
    """Check conditions before there are results.

    Args:
        conditions: texts of the conditions.
        metrics: metrics that will be measured. Default: not known.
        rows: names and methods of the rows that will have values. Default: not known. Rows of dense sampling with
            fewer steps are known only later, so they pass.

    Raises:
        ValueError: a condition has another form, or names a metric or row that there will not be.
    """
    for condition in map(parse, conditions):
        metric, row = condition.metric, condition.row
        known = [*(["psnr"] if metrics is None else metrics), *COUNTED]
        family = metrics is None and metric.partition("_")[0] in _FAMILIES
        if metric not in known and not family:
            raise condition.error(f"{metric!r} is not measured: must be one of {', '.join(known)}")
        if rows is not None and row is not None and row not in rows and not _FEWER.fullmatch(row):
            raise condition.error(f"no row {row!r} has values: must be one of {', '.join(rows)}")


def check(results: Results, conditions: Sequence[str]) -> list[str]:
    """Return a line for each row in which a condition holds.

    A condition is `[row:]metric sign number`, such as `psnr<25` or `SLA balanced: seconds_total >= 4`. The row is a
    name, or a method for all of its rows. Without a row, every available accelerated row counts. PSNR of identical
    pairs is infinite.

    Raises:
        ValueError: a condition has another form, names an unknown row or metric, or meets a missing value.
    """
    breaches = []
    known = [*metric_keys(results), *COUNTED]
    for condition in map(parse, conditions):
        if condition.metric not in known:
            raise condition.error(
                f"unknown {condition.metric!r}: must be one of {', '.join(known)}"
            )
        for row in _rows(results, condition):
            if row is reference_row(results) and definition(condition.metric).of_reference:
                raise condition.error(f"{condition.metric} compares with the row {row['name']!r}")
            found = condition.breach(*_value(row, condition.metric), f" of row {row['name']!r}")
            breaches += [f"{row['name']}: {x}" for x in found]
    return breaches


def check_metrics(metrics: Mapping[str, MetricValue], conditions: Sequence[str]) -> list[str]:
    """Return a line for each condition that holds for the metrics of one sample set; a row is an error."""
    breaches = []
    for condition in map(parse, conditions):
        if condition.row is not None or condition.metric not in metrics:
            raise condition.error(f"must be a condition on one of {', '.join(metrics)}")
        breaches += condition.breach(*_metric_value(metrics[condition.metric]))
    return breaches


def _rows(results: Results, condition: Condition) -> list[Row]:
    rows, name = results["rows"], condition.row
    if name is None:
        chosen = [row for row in rows if row["method"] in types.ACCELERATED and row["available"]]
    else:
        chosen = [row for row in rows if row["name"] == name]
        chosen = chosen or [row for row in rows if row["method"] == name]
    if not chosen:
        accepted = ", ".join(repr(row["name"]) for row in rows)
        raise condition.error(f"no row {name or 'of acceleration'!r}: must be one of {accepted}")
    for row in chosen:
        if not row["available"]:
            raise condition.error(f"row {row['name']!r} is not available ({row['why']})")
    return chosen


def _value(row: Row, metric: str) -> tuple[Any, str]:
    """Return a value of a row, and the reason if it is missing."""
    if metric in row["metrics"]:
        return _metric_value(row["metrics"][metric])
    kind, _, part = metric.partition("_")
    value: Any = row.get(metric)
    if kind == "seconds":
        value = row["seconds"][part]["median"] if part in row["seconds"] else None
    elif kind == "speedup":
        value = row["speedup"] and row["speedup"][part]
    return value, "not measured"


def _metric_value(metric: MetricValue) -> tuple[Any, str]:
    return math.inf if identical(metric) else metric["value"], metric.get("why", "not measured")
