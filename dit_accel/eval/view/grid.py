"""grid.png: one row of pictures for each sample, one column for each method."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from dit_accel.eval.results.types import Results
from dit_accel.sampling.media import BACKGROUND, enlarge

TILE, GAP, HEAD, PROMPT = 192, 8, 30, 26
"""Pixels: side of a picture, space between pictures, height of titles and of prompts."""


def grid(results: Results, folder: Path, samples: int) -> UInt8[np.ndarray, "h w 3"] | None:
    """Return a picture of the first samples, with the middle frame of clips; None without media."""
    from PIL import Image, ImageDraw

    chosen = [sample for sample in results["samples"] if sample["media"]][:samples]
    used = {name for sample in chosen for name in sample["media"]}
    names = [row["name"] for row in results["rows"] if row["name"] in used]
    if not names:
        return None
    width, height = GAP + len(names) * (TILE + GAP), HEAD + len(chosen) * (PROMPT + TILE + GAP)
    sheet = Image.new("RGB", (width, height), (BACKGROUND,) * 3)
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(names):
        place = GAP + i * (TILE + GAP), 9
        draw.text(place, fitting(name, TILE, 13), fill=(235, 235, 235), font=font(13))
    for j, sample in enumerate(chosen):
        y = HEAD + j * (PROMPT + TILE + GAP)
        prompt = fitting(sample["prompt"], width - 2 * GAP, 12)
        draw.text((GAP, y + 5), prompt, fill=(150, 156, 164), font=font(12))
        for i, name in enumerate(names):
            if name in sample["media"]:
                picture = _tile(folder / sample["media"][name])
                x = GAP + i * (TILE + GAP) + (TILE - picture.width) // 2
                sheet.paste(picture, (x, y + PROMPT + (TILE - picture.height) // 2))
    return np.asarray(sheet)


def _tile(path: Path) -> Any:
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
    return picture


def font(size: int) -> Any:
    """Return DejaVu Sans, which comes with matplotlib and covers many scripts."""
    from matplotlib import font_manager
    from PIL import ImageFont

    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def fitting(text: str, width: int, size: int) -> str:
    """Return one line of text, cut to a width in pixels."""
    text = " ".join(text.encode("utf-8", errors="replace").decode().split())[:400]
    letters = font(size)
    if letters.getlength(text) <= width:
        return text
    while text and letters.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
