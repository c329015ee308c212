"""grid.png: one row of pictures for each sample, one column for each method."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from dit_accel.eval.results.types import Results
from dit_accel.sampling.media import BACKGROUND, enlarge

TILE, GAP, HEAD, PROMPT = 192, 8, 30, 26
"""Pixels: side of a picture, space between pictures, height of titles and of prompts."""


def grid(results: Results, folder: Path, samples: int) -> Any:
    """Return a matplotlib figure of the first samples, with the middle frame of clips; None without media."""
    from matplotlib.figure import Figure

    chosen = [sample for sample in results["samples"] if sample["media"]][:samples]
    used = {name for sample in chosen for name in sample["media"]}
    names = [row["name"] for row in results["rows"] if row["name"] in used]
    if not names:
        return None
    width, height = GAP + len(names) * (TILE + GAP), HEAD + len(chosen) * (PROMPT + TILE + GAP)
    figure = Figure((width / 100, height / 100), dpi=100, facecolor=f"{BACKGROUND / 255:.3f}")

    def write(text: str, x: int, y: int, room: int, colour: str) -> None:
        text = " ".join(text.encode("utf-8", errors="replace").decode().split())
        most = room // 7  # pixels of a letter
        text = text if len(text) <= most else text[: most - 1] + "…"
        place: Any = {"color": colour, "fontsize": 9, "va": "top", "parse_math": False}
        figure.text(x / width, 1 - y / height, text, **place)

    for i, name in enumerate(names):
        write(name, GAP + i * (TILE + GAP), 9, TILE, "#ebebeb")
    for j, sample in enumerate(chosen):
        top = HEAD + j * (PROMPT + TILE + GAP)
        write(sample["prompt"], GAP, top + 5, width - GAP, "#969ca4")
        for i, name in enumerate(names):
            if name in sample["media"]:
                tile = _tile(folder / sample["media"][name])
                x = GAP + i * (TILE + GAP) + (TILE - tile.shape[1]) // 2
                y = top + PROMPT + (TILE - tile.shape[0]) // 2
                figure.figimage(tile, x, height - y - tile.shape[0])
    return figure


def _tile(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """Return a picture, or the middle frame of a clip, in the size of a tile."""
    import imageio.v3 as iio
    from PIL import Image

    try:
        if path.suffix.lower() == ".mp4":
            frames = iio.imread(path, plugin="FFMPEG")
            picture = Image.fromarray(frames[len(frames) // 2])
        else:
            with Image.open(path) as image:
                picture = image.convert("RGB")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable picture or clip ({error})") from None
    # Small pictures keep their pixels. The enlarged picture must not exceed the tile.
    smallest = TILE * min(picture.size) // max(picture.size)
    picture = Image.fromarray(enlarge(np.asarray(picture)[None], smallest)[0])
    picture.thumbnail((TILE, TILE))
    return np.asarray(picture)
