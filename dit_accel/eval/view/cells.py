"""Text of the values in tables, page and plot."""

import math
from dataclasses import dataclass

from dit_accel.eval.results.types import MetricValue, Phase, identical
from dit_accel.eval.view.definitions import SPEEDUP, Definition

MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
DASH, SPACE = "\N{EN DASH}", "\N{NARROW NO-BREAK SPACE}"


@dataclass(frozen=True)
class Cell:
    """Cell of the table."""

    text: str = DASH  # the value; without one a dash, or the reason
    range: str = ""  # interval or quartiles
    delta: str = ""  # signed difference to the reference row
    n: str = ""  # number of samples or calls behind the value
    value: float | None = None  # sort key: infinite for identical pairs, None without a value
    note: str = ""  # limits of the value
    best: bool = False  # whether this is the best value of the column


def metric_cell(
    metric: MetricValue | None, about: Definition, reference: MetricValue | None = None
) -> Cell:
    """Return the cell of a metric, with its interval and its difference to the reference row."""
    if metric is None:
        return Cell(note="not measured")
    n, value = sample_size(metric), metric["value"]
    if identical(metric):
        return Cell("identical", n=n, value=math.inf, note="all pairs are equal to the last bit")
    if value is None:
        return Cell(f"no value: {metric['why']}", n=n)
    digits = places(value, about)
    interval = metric["interval_95"]
    return Cell(
        number(value, digits),
        f"[{number(interval[0], digits)}, {number(interval[1], digits)}]" if interval else "",
        _difference(value, None if reference is None else reference["value"], digits),
        n,
        float(value),
        ", ".join(metric_notes(metric)),
    )


def sample_size(metric: MetricValue) -> str:
    """Return the number of samples, or of frames where every frame counts."""
    return f"{metric['n']} {metric['of']}" if "of" in metric else str(metric["n"])


def metric_notes(metric: MetricValue) -> list[str]:
    """Return the limits of a value."""
    notes = [str(flag) for flag in metric.get("flags") or []]
    if metric.get("infinite"):
        notes.append(f"{metric['infinite']} identical pairs left out")
    if metric.get("truncated"):
        notes.append(f"{metric['truncated']} prompts cut to CLIP's length")
    return notes


def short(unit: str) -> str:
    """Return the unit if it fits beside a value; the details of the page name the others."""
    return unit if len(unit) <= 8 else ""


def seconds_cell(phase: Phase | None) -> Cell:
    """Return the cell of median seconds with quartiles: three significant digits, at most milliseconds."""
    if phase is None:
        return Cell(note="not timed")
    median, once = phase["median"], phase["n"] == 1
    digits = 3 if median < 1 else 2 if median < 10 else 1 if median < 100 else 0
    low, high = (number(x, digits) for x in phase["iqr"])
    return Cell(
        number(median, digits),
        "" if once else f"({low}{DASH}{high})",
        n=str(phase["n"]),
        value=float(median),
        note="one run, so no quartiles" if once else "",
    )


def speedup_cell(value: int | float | None, row: Phase | None, reference: Phase | None) -> Cell:
    """Return the cell of a ratio of medians, with the range that the quartiles of both allow."""
    if value is None:
        return Cell(note="not timed")
    digits, between = places(value, SPEEDUP), ""
    several = row and reference and min(row["n"], reference["n"]) > 1
    if several and row is not reference and row["iqr"][0] > 0:  # type: ignore[index]
        (slow, fast), (low, high) = row["iqr"], reference["iqr"]  # type: ignore[index]
        between = f"({number(low / fast, digits)}{DASH}{number(high / slow, digits)})"
    n = "" if row is None else str(row["n"])
    return Cell(number(value, digits) + TIMES, between, n=n, value=float(value))


def plain_cell(
    value: int | float | None, about: Definition, reference: int | float | None = None
) -> Cell:
    """Return the cell of a counted number, with the difference to the reference row if that is given."""
    if value is None:
        return Cell(note="not measured")
    digits = places(value, about)
    return Cell(
        number(value, digits), delta=_difference(value, reference, digits), value=float(value)
    )


def number(value: int | float, digits: int, signed: bool = False) -> str:
    """Return a rounded number with a real minus sign and thin spaces between thousands; never a negative zero."""
    text = f"{value:,.{digits}f}".replace(",", SPACE)
    if not text.strip(f"-0.{SPACE}"):
        text = text.removeprefix("-")
        return "\N{PLUS-MINUS SIGN}" + text if signed else text
    if text.startswith("-"):
        return MINUS + text[1:]
    return "+" + text if signed else text


def places(value: int | float, about: Definition) -> int:
    """Return the number of digits after the point."""
    if about.digits is not None:
        return about.digits
    return min(6, max(0, 3 - math.floor(math.log10(abs(value))))) if value else 1


def _difference(value: int | float, reference: int | float | None, digits: int) -> str:
    return "" if reference is None else number(value - reference, digits, signed=True)
