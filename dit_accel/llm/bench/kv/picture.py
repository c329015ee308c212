"""`draw`: plot of quality against memory and read tokens."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MARKERS = "osD^v<>PX*"


def draw(results: Mapping[str, Any], path: Path) -> bool:
    """Plot the KL from transformers' own cache against the bytes of the cache and the share of tokens read.

    Args:
        results: results of `run_kv_bench`.
        path: path of the PNG file.

    Returns:
        True if the plot was written; False if there is nothing to plot or matplotlib is not installed.
    """
    rows = [x for x in results["rows"] if x["kv"] is not None and x.get("texts")]
    if not rows or importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    colours = colormaps["tab20"]
    for axis, key, label in (
        (axes[0], "bytes_share", "bytes, relative to transformers' own cache"),
        (axes[1], "read_share", "share of the tokens that a query reads"),
    ):
        for i, row in enumerate(rows):
            found = list(row["texts"].values())
            kl = max(1e-5, sum(x["kl"] for x in found) / len(found))
            at = sum(x[key] for x in found) / len(found)
            style = {"color": colours(i % colours.N), "marker": MARKERS[i % len(MARKERS)]}
            axis.plot(at, kl, linestyle="", markersize=8, label=row["name"], **style)
        axis.set(xlabel=label, yscale="log", xlim=(0, 1.15))
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    axes[0].set_ylabel("KL from transformers' own cache, nats")
    figure.suptitle(
        f"{results['model']}, {results['settings']['length']} tokens, {results['dtype']}"
    )
    figure.savefig(path, dpi=120)
    return True
