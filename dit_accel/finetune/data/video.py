"""Decode video files with PyAV into upright RGB frames at a constant frame rate."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from dit_accel.finetune.data.frame_rate import resample
from dit_accel.finetune.data.reader import BrokenFileError, opened

if TYPE_CHECKING:
    import av

Frame = UInt8[np.ndarray, "h w 3"]

_HDR = {16: "PQ", 18: "HLG"}
"""Transfer characteristics of HDR videos. 8-bit RGB would show their colours washed out."""
_ONE = 1 << 16
"""Fixed-point value of 1 in a display matrix."""


def probe_video(
    path: Path,
    *,
    fps: float | int | None,
    start: float | int,
    end: float | int | None,
    most: int | None,
) -> tuple[int, int, int]:
    """Return height and width after rotation, and the number of frames.

    Only one frame is decoded. All other frames are counted by their packets. Missing frames of a truncated file are
    not counted.

    Args:
        path: video file.
        fps: frame rate to which the video is resampled. None keeps the frames of the file.
        start: start of the part that is read, in seconds.
        end: end of the part that is read, in seconds. None: the end of the file.
        most: number of frames at which to stop counting. None counts all frames.

    Raises:
        BrokenFileError: if the file cannot be opened, or if no frame can be decoded.
    """
    first = next(video_frames(path, fps=fps, start=start, end=end), None)
    if first is None:
        part = f" after {start:g} s" if start else ""
        raise BrokenFileError(f"{path}: no frame{part} can be decoded")
    length = _length(start, end)
    # Stop counting at the end of the part, or when there are enough frames.
    limits = [] if length is None else [length]
    if most is not None and fps is not None:
        limits.append((most + 1) / fps)
    with opened(path, start) as reader:
        times = [(x, None) for x in reader.packet_times(min(limits, default=None))]
    found = resample(times, fps, length)
    return first.shape[0], first.shape[1], sum(1 for _ in itertools.islice(found, most))


def video_frames(
    path: Path, *, fps: float | int | None, start: float | int = 0.0, end: float | int | None = None
) -> Iterator[Frame]:
    """Yield the frames of a video as 8-bit RGB with square pixels, rotated by its display matrix.

    The frames end at the first damaged frame.

    Args:
        path: video file.
        fps: frame rate to which the video is resampled. None keeps the frames of the file.
        start: start of the part that is read, in seconds.
        end: end of the part that is read, in seconds. None: the end of the file.

    Raises:
        BrokenFileError: if the file cannot be opened, or if it cannot be converted to 8-bit RGB.
    """
    shown: av.VideoFrame | None = None
    picture: Frame | None = None
    size: tuple[int, int] | None = None
    with opened(path, start) as reader:
        for frame in resample(reader.frames(), fps, _length(start, end)):
            if picture is None or shown is not frame:
                if frame.color_trc in _HDR:
                    raise BrokenFileError(
                        f"{path}: HDR video ({_HDR[frame.color_trc]}); expected SDR, so convert it first"
                    )
                # Some files change their size in the middle. Keep the size of the first frame.
                size = size or (frame.height, max(1, round(frame.width * reader.pixel_aspect)))
                shown, picture = frame, _upright(path, frame, _rgb(path, frame, *size))
            yield picture


def _rgb(path: Path, frame: "av.VideoFrame", height: int, width: int) -> Frame:
    import av

    try:
        # One thread, because several files are decoded in parallel.
        return frame.reformat(width=width, height=height, format="rgb24", threads=1).to_ndarray()
    except av.FFmpegError as error:
        raise BrokenFileError(
            f"{path}: its pixels ({frame.format.name}) cannot be converted to RGB ({error.strerror})"
        ) from None


def _upright(path: Path, frame: "av.VideoFrame", picture: Frame) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Rotate and flip a picture according to the display matrix of its frame."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return picture
    # The matrix maps position (x, y) of the picture to (a x + c y, b x + d y) on the display.
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5] / _ONE
    straight, turned = (abs(a), abs(d)), (abs(b), abs(c))
    if not (np.allclose(straight, 1) and np.allclose(turned, 0)):
        if not (np.allclose(straight, 0) and np.allclose(turned, 1)):
            raise BrokenFileError(
                f"{path}: rotated by {frame.rotation} degrees; expected a multiple of 90"
            )
        picture = picture.transpose(1, 0, 2)
    if a + c < 0:
        picture = picture[:, ::-1]
    if b + d < 0:
        picture = picture[::-1]
    return np.ascontiguousarray(picture)


def _length(start: float | int, end: float | int | None) -> float | None:
    return None if end is None else end - start
