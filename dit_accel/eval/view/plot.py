"""The plot of quality against seconds, drawn by matplotlib."""

import io
from typing import Any

from dit_accel.eval.results.types import Results, Row, reference_row
from dit_accel.eval.view.cells import seconds_cell
from dit_accel.eval.view.definitions import definition
from dit_accel.eval.view.equal_time import dense_line
from dit_accel.eval.view.table import metric_unit

MARKS = {
    "dense": ("o", "#3c4451"),
    "fewer_steps": ("o", "#78818f"),
    "cache": ("s", "#b06f12"),
    "ras": ("^", "#0d8465"),
    "sla": ("D", "#3559cf"),
    "ras_sla": ("P", "#a33a8c"),
}
"""Marker and colour of each method; the page has the same."""
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "dit-accel", "text.parse_math": False}


def plotted_rows(results: Results, metric: str, phase: str) -> list[Row]:
    """Return the rows that have the metric and the seconds of the phase."""
    return [
        row
        for row in results["rows"]
        if row["available"]
        and phase in row["seconds"]
        and metric in row["metrics"]
        and (row["metrics"][metric]["value"] is not None or row["metrics"][metric].get("infinite"))
    ]


def quality_plot(results: Results, metric: str, phase: str) -> Any:
    """Return a matplotlib figure; None if fewer than two rows have values.

    Accelerated rows have the numbers that `plotted_rows` counts from 1, dense rows their number of steps. Bars are
    quartiles of the seconds and the 95 % interval of the metric. Rows identical to the reference are above the axes.
    """
    from matplotlib.figure import Figure

    rows, about = plotted_rows(results, metric, phase), definition(metric)
    finite = [row for row in rows if row["metrics"][metric]["value"] is not None]
    if len(rows) < 2 or not finite:
        return None
    figure = Figure(figsize=(8.8, 4.3))
    axes = figure.add_axes((0.08, 0.12, 0.9, 0.8))
    line = dense_line(results, metric, phase)
    axes.plot([x.seconds for x in line], [x.value for x in line], color=MARKS["fewer_steps"][1])
    for i, row in enumerate(rows, 1):
        marker, colour = MARKS[row["method"]]
        x, (low, high) = row["seconds"][phase]["median"], row["seconds"][phase]["iqr"]
        found = row["metrics"][metric]
        y, transform = found["value"], axes.transData
        if y is None:
            y, transform = 1.03, axes.get_xaxis_transform()
        else:
            axes.plot([low, high], [y, y], color=colour, alpha=0.5)
            axes.plot([x, x], found["interval_95"] or [y, y], color=colour, alpha=0.5)
        face = "white" if row["method"] == "fewer_steps" else colour
        style: dict[str, Any] = {"color": colour, "transform": transform, "clip_on": False}
        axes.plot([x], [y], marker, markerfacecolor=face, gid=f"row {i}", **style)
        text = str(i)
        if row["method"] in ("dense", "fewer_steps"):
            text = f"{row['num_inference_steps']} steps"
        place = {"xytext": (6, 5), "textcoords": "offset points", "fontsize": 9, "color": colour}
        axes.annotate(text, (x, y), xycoords=transform, **place)
    reference = reference_row(results)
    took = reference["seconds"].get(phase)
    if took is not None and not any(row is reference for row in rows):
        axes.axvline(took["median"], color=MARKS["dense"][1], linestyle=":")
        text = f"{reference['name']}: {seconds_cell(took).text} s"
        place = {"rotation": 90, "ha": "right", "fontsize": 9}
        axes.text(took["median"], 0.03, text, transform=axes.get_xaxis_transform(), **place)
    if len(finite) < len(rows):
        axes.text(0, 1.03, "identical", transform=axes.transAxes, fontsize=9, va="center")
    axes.set_xlim(0, None)
    axes.set_xlabel(f"{phase} seconds per call (median)")
    unit = metric_unit(results, metric)
    way = "" if about.better is None else f", {about.better} is better"
    axes.set_ylabel(about.label + (f" ({unit})" if unit else "") + way)
    axes.grid(color="#eef0f3")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_svg(results: Results, metric: str, phase: str) -> bytes | None:
    """Return the plot as SVG; None if there is none."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure = quality_plot(results, metric, phase)
        if figure is None:
            return None
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
