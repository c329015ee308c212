"""`draw_curves`: training curves as a picture, from the log."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_accel.files import atomic_path
from dit_accel.finetune.log import read_log

FILE_NAME = "curves.png"
WINDOW = 50
"""Steps of the moving average that is drawn over a noisy curve."""
NOISY = ("loss", "relative_error", "gradient_norm")
"""Values that the average is drawn over."""
STYLES = ("-", "--", ":", "-.")
PANELS = (
    ("loss", "loss", True),
    ("relative_error", "squared relative error of the velocity", True),
    ("probe_loss", "loss of the first batch", False),
    ("gradient_norm", "gradient norm", True),
    ("learning_rate", "learning rate", False),
    ("density", "realised density", False),
    ("validation/psnr", "PSNR against dense, dB", False),
    ("validation/ssim", "SSIM against dense", False),
    ("validation/latent_error", "latent error against dense", False),
)
"""Names of values, titles, and whether the axis is logarithmic. Values that the log lacks have no panel.
"learning_rate" has a curve for each group of parameters, "learning_rate/..." in the log."""
Series = dict[tuple[str, str], list[tuple[int, float]]]
"""(step, value) of a value by stage and group of parameters ("" where there are none)."""


def check_matplotlib() -> None:
    """Refuse a run that could not draw its curves at the end.

    Raises:
        ValueError: matplotlib is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("training curves need matplotlib: pip install matplotlib")


def draw_curves(log: str | os.PathLike, picture: str | os.PathLike) -> Path:
    """Draw the curves of a log.

    Args:
        log: `log.jsonl` of a run.
        picture: PNG file to write.

    Returns:
        The path of the picture.

    Raises:
        ValueError: matplotlib is not installed, or the log holds no values.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    records = read_log(Path(log))
    series = {name: points for name, *_ in PANELS if (points := points_of(records, name))}
    begins = _begins(records)
    if not series:
        raise ValueError(f"log={str(log)!r}: holds no values to draw")
    columns = min(2, len(series))
    rows = -(-len(series) // columns)
    # Fixed margins: laying out by the size of the text takes longer than drawing.
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
    """Return the points of a value, without those that are not finite."""
    points: Series = {}
    for x in records:
        prefix = f"{name}/"
        groups = {key.removeprefix(prefix): y for key, y in x.items() if key.startswith(prefix)}
        for group, value in (groups or {"": x.get(name)}).items():
            if isinstance(value, int | float) and math.isfinite(value):
                points.setdefault((x["stage"], group), []).append((x["step"], float(value)))
    return points


def _begins(records: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return where each stage begins on the axis: after the last step of the stages before it."""
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
    """Draw one value; the stages follow each other on the axis, each in its own colour, groups in their own style."""
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
    """Return the mean of the last `window` values at each place; fewer at the beginning."""
    total, means = 0.0, []
    for i, value in enumerate(values):
        total += value
        if i >= window:
            total -= values[i - window]
        means.append(total / min(i + 1, window))
    return means
