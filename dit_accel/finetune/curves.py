"""`draw_curves`: plot the training curves of a log."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_accel.files import atomic_path
from dit_accel.finetune.log import read_log

FILE_NAME = "curves.png"
WINDOW = 50
"""Length of the moving average in steps."""
NOISY = ("loss", "relative_error", "gradient_norm")
"""Values for which a moving average is drawn."""
STYLES = ("-", "--", ":", "-.")
PANELS = (
    ("loss", "loss", True),
    ("relative_error", "squared relative error of the velocity", True),
    ("probe_loss", "loss on the first batch", False),
    ("gradient_norm", "gradient norm", True),
    ("learning_rate", "learning rate", False),
    ("density", "realised density", False),
    ("validation/psnr", "PSNR against dense, dB", False),
    ("validation/ssim", "SSIM against dense", False),
    ("validation/latent_error", "latent error against dense", False),
)
"""Panels of the figure: name of the value in the log, title, and True for a logarithmic axis. Values that the log lacks
have no panel. "learning_rate" has one curve per parameter group ("learning_rate/..." in the log)."""
Series = dict[tuple[str, str], list[tuple[int, float]]]
"""Points (step, value) by stage and parameter group. The group is "" for values without groups."""


def check_matplotlib() -> None:
    """Raise an error before a run starts if its curves could not be drawn at the end.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("training curves need the package matplotlib (pip install matplotlib)")


def draw_curves(log: str | os.PathLike, picture: str | os.PathLike) -> Path:
    """Plot the training curves of a log into a PNG file.

    Args:
        log: path of the `log.jsonl` of a run.
        picture: path of the PNG file to write.

    Returns:
        The path of the PNG file.

    Raises:
        ValueError: if matplotlib is not installed, or if the log holds no values to plot.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    records = read_log(Path(log))
    series = {name: points for name, *_ in PANELS if (points := points_of(records, name))}
    begins = _begins(records)
    if not series:
        raise ValueError(f"log={str(log)!r}: holds no values to plot")
    columns = min(2, len(series))
    rows = -(-len(series) // columns)
    # Fixed margins, because matplotlib's automatic layout takes longer than drawing.
    figure = Figure(figsize=(6.4 * columns, 2.9 * rows))
    inch = 1 / (2.9 * rows)
    space = {"hspace": 0.5, "wspace": 0.2, "bottom": 0.5 * inch, "top": 1 - 0.4 * inch}
    space |= {"left": 0.75 / (6.4 * columns), "right": 1 - 0.2 / (6.4 * columns)}
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=space).flatten()
    panels = [panel for panel in PANELS if panel[0] in series]
    for axis, (name, title, logarithmic) in zip(axes, panels, strict=False):
        _panel(axis, series[name], title, begins, logarithmic=logarithmic, noisy=name in NOISY)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, dpi=110)
    return Path(picture)


def points_of(records: Sequence[dict[str, Any]], name: str) -> Series:
    """Return the finite points of a value in the log."""
    points: Series = {}
    for x in records:
        prefix = f"{name}/"
        groups = {key.removeprefix(prefix): y for key, y in x.items() if key.startswith(prefix)}
        for group, value in (groups or {"": x.get(name)}).items():
            if isinstance(value, int | float) and math.isfinite(value):
                points.setdefault((x["stage"], group), []).append((x["step"], float(value)))
    return points


def _begins(records: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return the position on the x axis at which each stage begins: the last step of the previous stages."""
    begins: dict[str, int] = {}
    last: dict[str, int] = {}
    for x in records:
        stage = x["stage"]
        if stage not in begins:
            begins[stage] = sum(last.values())
        last[stage] = max(last.get(stage, 0), x["step"])
    return begins


def _panel(
    axis: Any,
    series: Series,
    title: str,
    begins: dict[str, int],
    *,
    logarithmic: bool,
    noisy: bool,
) -> None:
    """Plot one value. Stages follow each other on the x axis; each has a colour, and each group has a line style."""
    colours = {stage: f"C{i}" for i, stage in enumerate(begins)}
    groups = list(dict.fromkeys(group for _, group in series))
    for (stage, group), points in series.items():
        steps = [begins[stage] + step for step, _ in points]
        values = [value for _, value in points]
        averaged = noisy and len(values) > WINDOW
        style: dict[str, Any] = {"color": colours[stage], "marker": "." if len(values) < 30 else ""}
        style["linestyle"] = STYLES[groups.index(group) % len(STYLES)]
        axis.plot(steps, values, alpha=0.35 if averaged else 1.0, label=group or stage, **style)
        if averaged:
            axis.plot(steps, moving_average(values, WINDOW), color=colours[stage])
    if logarithmic and all(value > 0 for points in series.values() for _, value in points):
        axis.set_yscale("log")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step", fontsize=9)
    axis.grid(alpha=0.25)
    if len(series) > 1:
        axis.legend(fontsize=8)


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of the last `window` values at each position, or of all previous values at the start."""
    total, means = 0.0, []
    for i, value in enumerate(values):
        total += value
        if i >= window:
            total -= values[i - window]
        means.append(total / min(i + 1, window))
    return means
