"""Geometry of the plot of quality against seconds; a template draws it as SVG.

Two widths are laid out, because text in an SVG shrinks with the picture: one for screens, one for
telephones.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from dit_accel.eval.results.types import Results, Row, reference_row
from dit_accel.eval.view.cells import Cell, figure_cell, number, seconds_cell, short
from dit_accel.eval.view.definitions import definition
from dit_accel.eval.view.equal_time import dense_line
from dit_accel.eval.view.labels import Box, Label, along, place_labels
from dit_accel.eval.view.table import metric_unit

TOP, RIGHT, BOTTOM, LEFT = 16, 20, 46, 62
BAND = 26
"""Height above the frame for rows identical to the reference, which have no finite PSNR."""


@dataclass(frozen=True)
class Tick:
    """Where on an axis, in pixels, and what it says."""

    at: float
    text: str


@dataclass(frozen=True)
class Point:
    """A row: seconds to the right, quality upwards, with quartiles and interval as bars."""

    name: str
    method: str
    label: str
    title: str
    x: float
    y: float
    x_bar: tuple[float, float]
    y_bar: tuple[float, float] | None


@dataclass(frozen=True)
class Plot:
    """Everything to draw, in pixels of a `width` x `height` picture."""

    metric: str
    phase: str
    width: int
    height: int
    frame: tuple[float, float, float, float]
    """Left, top, right, bottom."""
    x_title: str
    y_title: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    points: list[Point]
    labels: list[Label] = field(default_factory=list)
    line: list[tuple[float, float]] = field(default_factory=list)
    """Dense with fewer steps."""
    reference: Tick | None = None
    """Seconds of the reference where it has no value itself."""
    band: bool = False


class _Axis:
    """Round ticks around a range, and the way to pixels."""

    def __init__(
        self,
        values: Iterable[int | float],
        pixels: tuple[float, float],
        ticks: int,
        limits: tuple[float | None, float | None],
    ) -> None:
        from matplotlib.ticker import MaxNLocator

        values = [float(x) for x in values]  # JSON does not tell 3 from 3.0
        low, high = min(values), max(values)
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        lowest, highest = limits
        low = low - margin if lowest is None else max(low - margin, lowest)
        high = high + margin if highest is None else min(high + margin, max(highest, high))
        locator = MaxNLocator(nbins=ticks, steps=[1, 2, 2.5, 5, 10])
        found = [float(x) for x in locator.tick_values(low, high)]
        if len(found) < 2:
            found = [low, high]
        inside = [x for x in found if low <= x <= high]
        self.low, self.high = low, high
        self.pixels = pixels
        step = found[1] - found[0]
        digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
        if abs(step * 10**digits - round(step * 10**digits)) > 1e-6:  # a step of 2.5 or 0.25
            digits += 1
        self.ticks = [Tick(self(x), number(x, digits)) for x in inside]

    def __call__(self, value: int | float) -> float:
        start, end = self.pixels
        value = min(max(value, self.low), self.high)
        return round(start + (value - self.low) / (self.high - self.low) * (end - start), 2)


def quality_plot(results: Results, metric: str, phase: str, *, narrow: bool = False) -> Plot | None:
    """Rows that have both the metric and the seconds of the phase; None if fewer than two have.

    Args:
        metric: a key of `metrics`.
        phase: of the seconds.
        narrow: for a screen of 400 pixels.
    """
    rows = list(_rows(results, metric, phase))
    finite = [cell for _, cell, _ in rows if math.isfinite(cell.value or 0.0)]
    if len(rows) < 2 or not finite:
        return None
    about = definition(metric)
    width, height = (372, 380) if narrow else (880, 430)
    band = len(finite) < len(rows)
    frame = (float(LEFT), float(TOP + BAND * band), float(width - RIGHT), float(height - BOTTOM))
    reference = reference_row(results)
    at = reference["seconds"].get(phase)
    times = [t for row, _, _ in rows for t in (0.0, *row["seconds"][phase]["iqr"])]
    times += [row["seconds"][phase]["median"] for row, _, _ in rows]
    x = _Axis(
        times + ([at["median"]] if at else []),
        (frame[0], frame[2]),
        5 if narrow else 8,
        (0.0, None),
    )
    values = [v for row, cell, _ in rows for v in _span(row, metric, cell)]
    y = _Axis(values, (frame[3], frame[1]), 6, about.limits)
    points = [_point(row, cell, time, metric, phase, x, y) for row, cell, time in rows]
    hidden = at is not None and reference["name"] not in {p.name for p in points}
    marker = None
    if hidden and at is not None:
        marker = Tick(x(at["median"]), f"{reference['name']}: {seconds_cell(at).text} s")
    line = [(x(p.seconds), y(p.value)) for p in dense_line(results, metric, phase)]
    unit = short(metric_unit(results, metric))
    way = "" if about.better is None else f", {about.better} is better"
    return Plot(
        metric,
        phase,
        width,
        height,
        frame,
        f"{phase} seconds per call (median)",
        about.label + (f" ({unit})" if unit else "") + way,
        x.ticks,
        y.ticks,
        points,
        _labels(points, line, frame, narrow, marker),
        line if len(line) > 1 else [],
        marker,
        band,
    )


def _rows(results: Results, metric: str, phase: str) -> Iterator[tuple[Row, Cell, Cell]]:
    for row in results["rows"]:
        if row["available"] and metric in row["metrics"] and phase in row["seconds"]:
            cell = figure_cell(row["metrics"][metric], definition(metric))
            if cell.value is not None:
                yield row, cell, seconds_cell(row["seconds"][phase])


def _span(row: Row, metric: str, cell: Cell) -> list[int | float]:
    if cell.value is None or math.isinf(cell.value):
        return []
    return [cell.value, *(row["metrics"][metric]["interval_95"] or [])]


def _point(row: Row, cell: Cell, time: Cell, metric: str, phase: str, x: _Axis, y: _Axis) -> Point:
    seconds, figure = row["seconds"][phase], row["metrics"][metric]
    assert cell.value is not None
    same = math.isinf(cell.value)
    interval = figure["interval_95"]
    quality = " ".join(
        v for v in (cell.text, "" if same else short(figure["unit"]), cell.range) if v
    )
    took = " ".join(v for v in (time.text, "s", time.range) if v)
    label = f"{row['num_inference_steps']} steps" if row["method"] == "fewer_steps" else row["name"]
    return Point(
        row["name"],
        row["method"],
        label,
        f"{row['name']}: {definition(metric).label} {quality}, n = {cell.n}; "
        f"{phase} {took}, n = {seconds['n']}",
        x(seconds["median"]),
        TOP + BAND / 2 if same else y(cell.value),
        (x(seconds["iqr"][0]), x(seconds["iqr"][1])),
        None if same or interval is None else (y(interval[0]), y(interval[1])),
    )


def _labels(
    points: list[Point],
    line: list[tuple[float, float]],
    frame: Box,
    narrow: bool,
    marker: Tick | None,
) -> list[Label]:
    """Points without room for one have a tooltip and stand in the legend."""
    taken, bars = list(along(line)), list[Box]()
    for p in points:
        bars.append((p.x_bar[0], p.y - 1, p.x_bar[1], p.y + 1))
        if p.y_bar is not None:
            bars.append((p.x - 1, min(p.y_bar), p.x + 1, max(p.y_bar)))
    if marker is not None:
        taken.append((marker.at - 2, frame[1], marker.at + 2, frame[3]))
    left, _, right, bottom = frame
    longest = 14 if narrow else 26
    named = [
        (p.x, p.y, p.label if len(p.label) <= longest else p.label[: longest - 1] + "…")
        for p in points
    ]
    return place_labels(named, taken, bars, (left + 3, 2.0, right + RIGHT - 2, bottom - 2))
