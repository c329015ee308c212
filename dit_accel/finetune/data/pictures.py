"""Decode picture files with Pillow: still pictures, and animated GIF, WebP, PNG and AVIF files."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from dit_accel.finetune.data.frame_rate import Timed, resample
from dit_accel.finetune.data.reader import BrokenFileError
from dit_accel.sampling.image_files import read_image

Frame = UInt8[np.ndarray, "h w 3"]

_ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
_ORIENTATION = 0x0112
"""EXIF tag of the orientation of the camera."""
_SHORTEST = 10
_USUAL = 100
"""Durations in milliseconds. Like browsers, a frame with a duration below `_SHORTEST` is shown for `_USUAL`."""


def probe_picture(path: Path, *, fps: float | int | None) -> tuple[int, int, int]:
    """Return height and width after rotation, and the number of frames.

    Raises:
        BrokenFileError: if the file is not a readable picture with 8 bits per channel.
    """
    frames = list(picture_frames(path, fps=fps))
    return frames[0].shape[0], frames[0].shape[1], len(frames)


def picture_frames(path: Path, *, fps: float | int | None) -> Iterator[Frame]:
    """Yield the frames of a picture as 8-bit RGB. A still picture has one frame.

    Args:
        path: picture file. Its EXIF orientation is applied.
        fps: frame rate to which an animated picture is resampled. None yields its own frames.

    Raises:
        BrokenFileError: if the file is not a readable picture with 8 bits per channel.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            animated = image.format in _ANIMATED and getattr(image, "n_frames", 1) > 1
            orientation = image.getexif().get(_ORIENTATION, 1)
    # Pillow raises different errors, depending on where a file is damaged.
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BrokenFileError(f"{path}: not a readable picture ({error})") from None
    if animated:
        yield from resample(_animation(path), fps)
        return
    try:
        picture = Image.fromarray(read_image(path))
    except ValueError as error:
        raise BrokenFileError(str(error)) from None
    picture.getexif()[_ORIENTATION] = orientation
    yield np.array(ImageOps.exif_transpose(picture))


def _animation(path: Path) -> Iterator[tuple[Timed, Frame]]:
    from PIL import Image, ImageSequence

    time = Fraction(0)
    try:
        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                pixels = _opaque(path, frame)
                shown = frame.info.get("duration", 0)
                duration = Fraction(shown if shown >= _SHORTEST else _USUAL) / 1000
                yield Timed(time, duration), pixels
                time += duration
    except (OSError, EOFError, SyntaxError, Image.DecompressionBombError) as error:
        if not time:
            raise BrokenFileError(f"{path}: not a readable picture ({error})") from None


def _opaque(path: Path, frame: Any) -> Frame:
    if frame.has_transparency_data and np.array(frame.convert("RGBA"))[..., 3].min() < 255:
        raise BrokenFileError(f"{path}: has transparent pixels; expected an opaque picture")
    return np.array(frame.convert("RGB"))
