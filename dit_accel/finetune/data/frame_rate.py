"""`resample`: frames with times of their own to frames of a constant rate."""

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Timed(NamedTuple):
    """Time of a frame in a video."""

    time: Fraction
    """Seconds since the part of the video that is read begins; negative before it."""
    duration: Fraction
    """Seconds until the next frame; 0: unknown."""


def resample(
    frames: Iterable[tuple[Timed, T]], fps: float | int | None, end: float | int | None = None
) -> Iterator[T]:
    """Yield the frames of a constant frame rate.

    An output frame is the last frame whose time has come, so frames are repeated or left out. Because files round
    times, a frame may be early by a quarter of the shorter interval. The first frame is repeated up to its time.

    Args:
        frames: frames by rising time.
        fps: frames per second. None: every frame once, as it comes.
        end: seconds at which to stop. Default: with the last frame.
    """
    last_time = None if end is None else Fraction(end)
    if fps is None:
        for timed, frame in frames:
            if last_time is not None and timed.time >= last_time:
                return
            if timed.time + timed.duration > 0 or timed.time >= 0:
                yield frame
        return
    rate = Fraction(fps).limit_denominator(100_000)
    made = 0
    held: tuple[Timed, T] | None = None
    for timed, frame in frames:
        if last_time is not None and timed.time >= last_time:
            break
        if held is not None:
            gap = timed.time - held[0].time
            for _ in range(made, _first_output(timed.time, gap, rate)):
                yield held[1]
                made += 1
        held = timed, frame
    if held is None:
        return
    (time, duration), frame = held
    until = time + duration if last_time is None else min(last_time, time + duration)
    if time < 0 and until <= 0:
        return  # the part that is read begins behind the last frame
    # A video of one frame often has no duration.
    for _ in range(made, max(_first_output(until, duration, rate), 1)):
        yield frame


def _first_output(time: Fraction, gap: Fraction, rate: Fraction) -> int:
    """Return the number of the first output frame that may show a frame.

    Args:
        time: seconds at which the frame begins.
        gap: seconds since the frame before began.
        rate: output frames per second.
    """
    return math.ceil(time * rate - min(gap * rate, Fraction(1)) / 4)
