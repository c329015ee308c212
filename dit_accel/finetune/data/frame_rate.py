"""`resample`: convert frames with timestamps to a constant frame rate."""

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Timed(NamedTuple):
    """Timestamp of a frame in a video."""

    time: Fraction
    """Seconds since the start of the part that is read. Negative for earlier frames."""
    duration: Fraction
    """Seconds until the next frame; 0 if unknown."""


def resample(
    frames: Iterable[tuple[Timed, T]], fps: float | int | None, end: float | int | None = None
) -> Iterator[T]:
    """Yield frames at a constant frame rate by repeating and dropping frames.

    Each output frame is the last input frame whose time has been reached. Files round their timestamps, so an input
    frame may appear early, by up to a quarter of the shorter of the two frame intervals. Before the time of the first
    input frame, that frame is shown.

    Args:
        frames: input frames with ascending timestamps.
        fps: output frames per second. None yields every input frame once.
        end: time in seconds at which to stop. Default: the end of the last frame.
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
        return  # the part that is read begins after the last frame
    # A video of one frame often has no duration. Yield its frame at least once.
    for _ in range(made, max(_first_output(until, duration, rate), 1)):
        yield frame


def _first_output(time: Fraction, gap: Fraction, rate: Fraction) -> int:
    """Return the index of the first output frame that may show an input frame.

    Args:
        time: time of the input frame in seconds.
        gap: seconds since the previous input frame.
        rate: output frames per second.
    """
    return math.ceil(time * rate - min(gap * rate, Fraction(1)) / 4)
