"""Image files: supported formats, and reading a file as RGB without losing information."""

import mimetypes
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".avif", ".avifs",
)  # fmt: skip
"""Suffixes of image files that are read."""
VIDEO_SUFFIXES = (".mp4", ".gif", ".webm", ".mov", ".mkv", ".avi")
_OTHER_IMAGES = (
    ".heic", ".heif", ".hif", ".jxl", ".exr", ".hdr", ".dng", ".nef", ".cr2", ".cr3", ".arw", ".raw", ".orf",
    ".rw2", ".raf", ".qoi", ".jp2", ".j2k", ".jpx", ".jpc", ".jpf", ".psd", ".psb", ".xcf", ".svg", ".svgz",
    ".ico", ".icns", ".eps", ".apng", ".mpo", ".dds", ".fits", ".sgi", ".rgb", ".pcx", ".pfm", ".pam",
    ".wdp", ".jxr", ".emf", ".wmf", ".cur",
)  # fmt: skip
"""Suffixes of other image files, which `mimetypes` does not know on every system."""


def is_image_file(path: Path) -> bool:
    """Return whether the file has the suffix of an image format that is read."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def is_unread_image_file(path: Path) -> bool:
    """Return whether the file has the suffix of an image format that is not read."""
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES or suffix in VIDEO_SUFFIXES:
        return False
    guessed, _ = mimetypes.guess_type(f"x{suffix}")
    return suffix in _OTHER_IMAGES or (guessed or "").startswith("image/")


def read_image(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """Return an image file as 8-bit RGB.

    Raises:
        ValueError: the file is unreadable or truncated, or cannot be converted to 8-bit RGB without loss.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            lost = _lost_in_rgb(image)
            pixels = np.array(image.convert("RGB"))
    # Pillow raises different errors depending on where a file is damaged.
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from None
    if lost is not None:
        raise ValueError(f"{path}: {lost}; must be one opaque image with 8 bits per channel")
    return pixels


def _lost_in_rgb(image: Any) -> str | None:
    """Return what the conversion to 8-bit RGB would lose, or None."""
    if image.format in ("TIFF", "AVIF") and (count := getattr(image, "n_frames", 1)) > 1:
        return f"{count} images in one file"
    # Pillow opens 16-bit RGB as 8-bit RGB. Only `tile` has the mode of the file.
    if image.mode in ("I", "F") or ";16" in f"{image.mode} {image.tile}" or _is_deep_ppm(image):
        return f"more than 8 bits per channel (mode {image.mode})"
    if image.has_transparency_data and np.array(image.convert("RGBA"))[..., 3].min() < 255:
        return f"transparent pixels (mode {image.mode})"
    return None


def _is_deep_ppm(image: Any) -> bool:
    """Return whether a PPM file has more than 8 bits per channel. Pillow scales it down; `tile` has its largest value."""
    if image.format != "PPM" or not image.tile:
        return False
    arguments = image.tile[0][3]
    values = arguments if isinstance(arguments, tuple) else (arguments,)
    return any(isinstance(x, int) and x > 255 for x in values)
