"""`draw`: quality against bytes as a picture."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw(results: Mapping[str, Any], path: Path) -> bool:
    """Draw the distance from transformers' own cache against bytes and the share of the tokens that is read.

    Args:
        results: see `run_bench`.
        path: PNG file.

    Returns:
        Whether there was something to draw and matplotlib is installed.
    """
    rows = [x for x in results["rows"] if x["kv"] is not None and x.get("texts")]
    if not rows or importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key, label in (
        (axes[0], "bytes_share", "bytes, share of transformers' own cache"),
        (axes[1], "read_share", "tokens that a query reads, share"),
    ):
        for row in rows:
            found = list(row["texts"].values())
            kl = max(1e-5, sum(x["kl"] for x in found) / len(found))
            at = sum(x[key] for x in found) / len(found)
            axis.plot(at, kl, "o", color="tab:blue")
            axis.annotate(
                row["name"], (at, kl), xytext=(4, 4), textcoords="offset points", fontsize=9
            )
        axis.set(xlabel=label, yscale="log", xlim=(0, 1.15))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("KL from transformers' own cache, nats")
    figure.suptitle(
        f"{results['model']}, {results['settings']['length']} tokens, {results['dtype']}"
    )
    figure.savefig(path, dpi=120)
    return True
