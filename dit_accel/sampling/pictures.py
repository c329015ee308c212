"""`read_image`: one picture file as RGB, or an error that says what is wrong with it."""

import mimetypes
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".avif", ".avifs",
)  # fmt: skip
"""Suffixes of pictures that are read."""
VIDEO_SUFFIXES = (".mp4", ".gif", ".webm", ".mov", ".mkv", ".avi")
_OTHER_IMAGES = (
    ".heic", ".heif", ".hif", ".jxl", ".exr", ".hdr", ".dng", ".nef", ".cr2", ".cr3", ".arw", ".raw", ".orf",
    ".rw2", ".raf", ".qoi", ".jp2", ".j2k", ".jpx", ".jpc", ".jpf", ".psd", ".psb", ".xcf", ".svg", ".svgz",
    ".ico", ".icns", ".eps", ".apng", ".mpo", ".dds", ".fits", ".sgi", ".rgb", ".pcx", ".pfm", ".pam",
    ".wdp", ".jxr", ".emf", ".wmf", ".cur",
)  # fmt: skip
"""Suffixes of pictures that Python's table of media types does not know everywhere."""


def is_picture(path: Path) -> bool:
    """Return whether the suffix is that of a picture that is read."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def is_unread_picture(path: Path) -> bool:
    """Return whether the suffix is that of a picture which is not read."""
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES or suffix in VIDEO_SUFFIXES:
        return False
    guessed, _ = mimetypes.guess_type(f"x{suffix}")
    return suffix in _OTHER_IMAGES or (guessed or "").startswith("image/")


def read_image(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """Return one picture as RGB.

    Raises:
        ValueError: it is unreadable or truncated, or RGB of 8 bits would not be the picture.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            lost = _lost_in_rgb(image)
            pixels = np.array(image.convert("RGB"))
    # What Pillow raises depends on where a damaged file breaks off.
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from None
    if lost is not None:
        raise ValueError(f"{path}: {lost}; accepted are 8 bits a channel, opaque, one picture")
    return pixels


def _lost_in_rgb(image: Any) -> str | None:
    """Return what the conversion would drop without a word."""
    if image.format in ("TIFF", "AVIF") and (count := getattr(image, "n_frames", 1)) > 1:
        return f"{count} pictures in one file"
    # The tile names the mode in the file: Pillow opens RGB of 16 bits as RGB.
    if image.mode in ("I", "F") or ";16" in f"{image.mode} {image.tile}" or _is_deep_ppm(image):
        return f"a picture of more than 8 bits a channel (mode {image.mode})"
    if image.has_transparency_data and np.array(image.convert("RGBA"))[..., 3].min() < 255:
        return f"a picture with transparent pixels (mode {image.mode})"
    return None


def _is_deep_ppm(image: Any) -> bool:
    """Return whether a PPM has more than 8 bits, which Pillow scales down; its tile holds the largest value."""
    if image.format != "PPM" or not image.tile:
        return False
    arguments = image.tile[0][3]
    values = arguments if isinstance(arguments, tuple) else (arguments,)
    return any(isinstance(x, int) and x > 255 for x in values)
