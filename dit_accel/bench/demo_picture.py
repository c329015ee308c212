"""Picture of an evaluation of an image model: samples of each method, and how they differ from dense sampling."""

from pathlib import Path
from typing import Any

import numpy as np

from dit_accel.eval.results.store import read_results
from dit_accel.files import atomic_path
from dit_accel.sampling.image_files import read_image

BRIGHTER = 8
"""Factor of the differences."""


def label(row: dict[str, Any]) -> str:
    """Return name, cost and quality of a row of results.json."""
    psnr = row["metrics"].get("psnr", {}).get("value")
    if psnr is None:
        return f"{row['name']}\n{row['num_inference_steps']} steps"
    return f"{row['name']}\ncost of {row['cost'] or row['num_inference_steps']:.0f} steps\nPSNR {psnr:.1f} dB"


def draw(folder: Path, output: Path, samples: int = 4) -> None:
    """Draw the first samples of an evaluation as a PNG file.

    Args:
        folder: folder of `dit-accel eval run`, with images.
        output: file to write.
        samples: number of samples.
    """
    from matplotlib.figure import Figure

    results = read_results(folder)
    shown = results["samples"][:samples]
    rows = [row for row in results["rows"] if row["name"] in shown[0]["media"]]
    figure = Figure((2 * samples + 1.6, len(rows) + 0.5), dpi=100)
    axes = figure.subplots(len(rows), 2 * samples, squeeze=False)
    figure.subplots_adjust(left=0.16, right=0.99, top=0.92, bottom=0.01, wspace=0.05, hspace=0.08)
    for line, row in zip(axes, rows, strict=True):
        for i, sample in enumerate(shown):
            dense = read_image(folder / sample["media"][rows[0]["name"]])
            picture = read_image(folder / sample["media"][row["name"]])
            difference = np.abs(dense.astype(np.int16) - picture) * BRIGHTER
            line[i].imshow(picture)
            line[samples + i].imshow(difference.clip(0, 255).astype(np.uint8))
        place = {"rotation": 0, "ha": "right", "va": "center", "fontsize": 9}
        line[0].set_ylabel(label(dict(row)), **place)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    title = f"difference to all {rows[0]['num_inference_steps']} steps, {BRIGHTER} times brighter"
    for left, text in ((0.16, "samples, same prompts and noise"), (0.58, title)):
        figure.text(left, 0.95, text, fontsize=9)
    with atomic_path(output) as temporary:
        figure.savefig(temporary, format="png")
