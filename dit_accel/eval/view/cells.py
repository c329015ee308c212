"""Figures as text: one formatting for the Markdown table, the page and the plot."""

import math
from dataclasses import dataclass
from typing import Any, cast

from dit_accel.eval.results.types import MetricValue, Phase, identical
from dit_accel.eval.view.definitions import COST, DENSITY, MEMORY, SPEEDUP, Definition

MINUS, TIMES, DASH = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """A figure in a table."""

    text: str = DASH
    """The figure; where there is none, a dash or why."""
    range: str = ""
    """Its interval or quartiles."""
    delta: str = ""
    """Signed difference to the reference row."""
    n: str = ""
    """How many samples or runs it rests on."""
    value: float | None = None
    """What to sort by; infinite for identical pairs, None where there is no figure."""
    note: str = ""
    """What to know about it."""
    best: bool = False


def figure_cell(
    figure: MetricValue | None, about: Definition, reference: MetricValue | None = None
) -> Cell:
    """A metric, with its interval and its difference to the reference row's."""
    if figure is None:
        return Cell(note="not measured")
    n = sample_size(figure)
    if identical(figure):
        return Cell("identical", n=n, value=math.inf, note="all pairs are equal to the last bit")
    value = figure["value"]
    if value is None:
        return Cell(f"no value: {figure['why']}", n=n)
    digits = places(value, about)
    interval = figure["interval_95"]
    return Cell(
        number(value, digits),
        ""
        if interval is None
        else f"[{number(interval[0], digits)}, {number(interval[1], digits)}]",
        _difference(value, None if reference is None else reference["value"], digits),
        n,
        float(value),
        ", ".join(figure_notes(figure)),
    )


def sample_size(figure: MetricValue) -> str:
    """The number of samples; of frames, where each frame of a clip counts."""
    extras = cast(dict[str, Any], figure)
    return f"{figure['n']} {extras['of']}" if "of" in extras else str(figure["n"])


def figure_notes(figure: MetricValue) -> list[str]:
    """What a reader must know about the figure."""
    extras = cast(dict[str, Any], figure)
    notes = [str(flag) for flag in extras.get("flags") or []]
    if extras.get("infinite"):
        notes.append(f"{extras['infinite']} identical pairs left out")
    if extras.get("truncated"):
        notes.append(f"{extras['truncated']} prompts cut to CLIP's length")
    return notes


def short(unit: str) -> str:
    """A unit that fits beside a figure; the others stand in the page's details."""
    return unit if len(unit) <= 8 else ""


def seconds_cell(phase: Phase | None) -> Cell:
    """Median seconds with the quartiles."""
    if phase is None:
        return Cell(note="not timed")
    digits = _second_places(phase["median"])
    low, high = (number(x, digits) for x in phase["iqr"])
    once = phase["n"] == 1
    return Cell(
        number(phase["median"], digits),
        "" if once else f"({low}{DASH}{high})",
        n=str(phase["n"]),
        value=float(phase["median"]),
        note="one run, so no quartiles" if once else "",
    )


def speedup_cell(value: int | float | None, row: Phase | None, reference: Phase | None) -> Cell:
    """A ratio of medians, with the range that the quartiles of both allow."""
    if value is None:
        return Cell(note="not timed")
    assert SPEEDUP.digits is not None
    text, between = number(value, SPEEDUP.digits) + TIMES, ""
    if row is not None and reference is not None and row is not reference and row["iqr"][0] > 0:
        low, high = reference["iqr"][0] / row["iqr"][1], reference["iqr"][1] / row["iqr"][0]
        if row["n"] > 1 and reference["n"] > 1:
            between = f"({number(low, SPEEDUP.digits)}{DASH}{number(high, SPEEDUP.digits)})"
    return Cell(text, between, n="" if row is None else str(row["n"]), value=float(value))


def memory_cell(size: int | None, reference: int | None) -> Cell:
    """Bytes as MiB, with the difference to the reference row's."""
    if size is None:
        return Cell(note="not measured")
    assert MEMORY.digits is not None
    mebi = size / 2**20
    other = None if reference is None else reference / 2**20
    return Cell(
        number(mebi, MEMORY.digits),
        delta=_difference(mebi, other, MEMORY.digits),
        value=float(size),
    )


def plain_cell(value: int | float | None, about: Definition) -> Cell:
    """A counted number: it has no interval."""
    assert about is DENSITY or about is COST
    if value is None:
        return Cell(note="not counted")
    return Cell(number(value, places(value, about)), value=float(value))


def number(value: int | float, digits: int, signed: bool = False) -> str:
    """Rounded, with a real minus sign and thin groups of thousands; never a negative zero."""
    text = f"{value:,.{digits}f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    if not text.strip("-0.\N{NARROW NO-BREAK SPACE}"):
        text = text.removeprefix("-")
        return "\N{PLUS-MINUS SIGN}" + text if signed else text
    if text.startswith("-"):
        return MINUS + text[1:]
    return "+" + text if signed else text


def places(value: int | float, about: Definition) -> int:
    """Digits after the point."""
    if about.digits is not None:
        return about.digits
    return min(6, max(0, 3 - math.floor(math.log10(abs(value))))) if value else 1


def _second_places(seconds: int | float) -> int:
    """Three significant digits, no finer than a millisecond."""
    return 3 if seconds < 1 else 2 if seconds < 10 else 1 if seconds < 100 else 0


def _difference(value: int | float, reference: int | float | None, digits: int) -> str:
    return "" if reference is None else number(value - reference, digits, signed=True)
