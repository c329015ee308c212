"""Decoding of picture files with Pillow: stills, and animated GIF, WebP, PNG and AVIF files."""

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
"""EXIF tag that says how a camera was held."""
_SHORTEST = 10
_USUAL = 100
"""Milliseconds that browsers show a frame whose duration is below the shortest one."""


def probe_picture(path: Path, *, fps: float | int | None) -> tuple[int, int, int]:
    """Return height and width as shown, and the number of frames.

    Raises:
        BrokenFileError: it is not a readable picture of 8 bits a channel.
    """
    frames = list(picture_frames(path, fps=fps))
    return frames[0].shape[0], frames[0].shape[1], len(frames)


def picture_frames(path: Path, *, fps: float | int | None) -> Iterator[Frame]:
    """Yield the frame of a still, or the frames of an animated picture, as 8-bit RGB.

    Args:
        path: picture file. The orientation that a camera wrote into it is applied.
        fps: frames per second that an animated picture is resampled to. None: its frames.

    Raises:
        BrokenFileError: it is not a readable picture of 8 bits a channel.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            animated = image.format in _ANIMATED and getattr(image, "n_frames", 1) > 1
            orientation = image.getexif().get(_ORIENTATION, 1)
    # What Pillow raises depends on where a damaged file breaks off.
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
        raise BrokenFileError(f"{path}: has transparent pixels; accepted are opaque pictures")
    return np.array(frame.convert("RGB"))
