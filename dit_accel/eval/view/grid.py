"""grid.png: samples below each other, methods side by side."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from dit_accel.eval.results.types import Results
from dit_accel.sampling.media import BACKGROUND, enlarge

TILE, GAP, HEAD, PROMPT = 192, 8, 30, 26
"""Pixels: side of a picture, space between, height of the titles and of the prompts."""
INK, FAINT = (235, 235, 235), (150, 156, 164)


def grid(results: Results, folder: Path, samples: int) -> UInt8[np.ndarray, "h w 3"] | None:
    """One picture of every row for the first `samples` samples, the middle frame of clips; None
    where there are no media."""
    from PIL import Image, ImageDraw

    chosen = [sample for sample in results["samples"] if sample["media"]][:samples]
    names = [
        row["name"] for row in results["rows"] if any(row["name"] in x["media"] for x in chosen)
    ]
    if not names:
        return None
    width = GAP + len(names) * (TILE + GAP)
    height = HEAD + len(chosen) * (PROMPT + TILE + GAP)
    sheet = Image.new("RGB", (width, height), (BACKGROUND,) * 3)
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(names):
        x = GAP + i * (TILE + GAP)
        draw.text((x, 9), fitting(name, TILE, 13), fill=INK, font=font(13))
    for j, sample in enumerate(chosen):
        y = HEAD + j * (PROMPT + TILE + GAP)
        draw.text(
            (GAP, y + 5), fitting(sample["prompt"], width - 2 * GAP, 12), fill=FAINT, font=font(12)
        )
        for i, name in enumerate(names):
            if name in sample["media"]:
                picture = Image.fromarray(_tile(folder / sample["media"][name]))
                x = GAP + i * (TILE + GAP) + (TILE - picture.width) // 2
                sheet.paste(picture, (x, y + PROMPT + (TILE - picture.height) // 2))
    return np.asarray(sheet)


def _tile(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """The picture, or a clip's middle frame, no larger than a tile."""
    from PIL import Image

    try:
        if path.suffix.lower() == ".mp4":
            import imageio.v3 as iio

            frames = iio.imread(path, plugin="FFMPEG")
            frame = frames[len(frames) // 2]
        else:
            with Image.open(path) as image:
                frame = np.asarray(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable picture or clip ({error})") from None
    # Small pictures keep their pixels; whole-number enlargement must not overshoot the tile.
    frame = enlarge(frame[None], TILE * min(frame.shape[:2]) // max(frame.shape[:2]))[0]
    picture = Image.fromarray(frame)
    picture.thumbnail((TILE, TILE))
    return np.asarray(picture)


def font(size: int):
    """matplotlib's DejaVu Sans: it comes with the package and knows many scripts."""
    import matplotlib
    from PIL import ImageFont

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)


def fitting(text: str, width: int, size: int) -> str:
    """One line of `text`, cut to `width` pixels."""
    text = " ".join(text.encode("utf-8", errors="replace").decode().split())[:400]
    letters = font(size)
    if letters.getlength(text) <= width:
        return text
    while text and letters.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
