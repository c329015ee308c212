"""The plot of quality against seconds, drawn by matplotlib."""

import io
import warnings
from typing import Any

from dit_accel.eval.results.types import ACCELERATED, Results, Row, reference_row
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
_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "dit-accel", "text.parse_math": False}


def plotted_rows(results: Results, metric: str, phase: str) -> list[tuple[str, Row]]:
    """Return the rows that have the metric and the seconds of the phase, with their labels.

    Accelerated rows are numbered, dense rows have their number of steps.
    """
    out: list[tuple[str, Row]] = []
    number = 0
    for row in results["rows"]:
        found = row["metrics"].get(metric)
        if not found or phase not in row["seconds"]:
            continue
        if found["value"] is not None or found.get("infinite"):
            number += row["method"] in ACCELERATED
            steps = f"{row['num_inference_steps']} steps"
            out.append((str(number) if row["method"] in ACCELERATED else steps, row))
    return out


def quality_plot(results: Results, metric: str, phase: str) -> Any:
    """Return a matplotlib figure; None if fewer than two rows have values.

    Bars are quartiles of the seconds and the 95 % interval of the metric. Rows identical to the reference are above the
    axes. A dotted line marks the seconds of the reference if it has no value.
    """
    from matplotlib.figure import Figure

    rows, about = plotted_rows(results, metric, phase), definition(metric)
    finite = [row for _, row in rows if row["metrics"][metric]["value"] is not None]
    if len(rows) < 2 or not finite:
        return None
    figure = Figure(figsize=(8.8, 4.3))
    axes: Any = figure.add_axes((0.08, 0.12, 0.9, 0.8))
    line, above = dense_line(results, metric, phase), axes.get_xaxis_transform()
    axes.plot([x.seconds for x in line], [x.value for x in line], color=MARKS["fewer_steps"][1])
    for label, row in rows:
        marker, colour = MARKS[row["method"]]
        took, found = row["seconds"][phase], row["metrics"][metric]
        x, y, place = took["median"], found["value"], axes.transData
        if y is None:
            y, place = 1.03, above
        else:
            axes.plot(took["iqr"], [y, y], color=colour, alpha=0.5)
            axes.plot([x, x], found["interval_95"] or [y, y], color=colour, alpha=0.5)
        face = "white" if row["method"] == "fewer_steps" else colour
        style: dict[str, Any] = {"color": colour, "transform": place, "clip_on": False}
        axes.plot([x], [y], marker, label=row["name"], markerfacecolor=face, **style)
        text = {"xytext": (6, 5), "textcoords": "offset points", "fontsize": 9, "color": colour}
        axes.annotate(label, (x, y), xycoords=place, **text)
    reference = reference_row(results)
    if phase in reference["seconds"] and not any(row is reference for _, row in rows):
        at = reference["seconds"][phase]
        axes.axvline(at["median"], color=MARKS["dense"][1], linestyle=":")
        text = {"rotation": 90, "ha": "right", "fontsize": 9, "transform": above}
        axes.text(at["median"], 0.03, f"{reference['name']}: {seconds_cell(at).text} s", **text)
    if len(finite) < len(rows):
        axes.text(0, 1.03, "identical", transform=axes.transAxes, fontsize=9, va="center")
    axes.set_xlim(0, None)
    unit, way = metric_unit(results, metric), about.better and f", {about.better} is better"
    axes.set_ylabel(about.label + (f" ({unit})" if unit else "") + (way or ""))
    axes.set_xlabel(f"{phase} seconds per call (median)")
    axes.grid(color="#eef0f3")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_svg(results: Results, metric: str, phase: str) -> bytes | None:
    """Return the plot as SVG; None if there is none."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks
        figure = quality_plot(results, metric, phase)
        if figure is None:
            return None
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
