"""`opened`: the packets and frames of one video file with their times, up to the first damage."""

import contextlib
import itertools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.finetune.data.frame_rate import Timed

if TYPE_CHECKING:
    import av
    from av.packet import Packet

_FORMATS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,m4v,asf,flv,ogg,mxf,nut,gif,h264,hevc,av1,obu,ivf,yuv4mpegpipe"
"""Containers that are opened. Playlists are not: they make ffmpeg read other files and the network."""
_WITHOUT_TIMES = ("avi", "h264", "hevc", "m4v", "mpegvideo", "obu", "yuv4mpegpipe")
"""Containers that store no times; ffmpeg guesses those of AVI, wrongly where frames are reordered."""


class BrokenFileError(ValueError):
    """A file of the data set cannot be used; the message names it."""


class Reader:
    """One opened video."""

    def __init__(self, stream: Any, packets: Iterator["Packet"], start: float | int) -> None:
        """Read from the packets of a stream.

        Args:
            stream: the video stream.
            packets: its packets; the first one is at or before `start`.
            start: seconds in the stream that times count from.
        """
        self._stream, self._start = stream, Fraction(start)
        first = next(packets, None)
        self._packets = packets if first is None else itertools.chain([first], packets)
        pts = None if first is None else first.pts
        self._timed = pts is not None and _has_times(stream)
        self._origin: int = (pts or 0) if stream.start_time is None else stream.start_time
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        self._interval = 1 / Fraction(rate)

    @property
    def pixel_aspect(self) -> Fraction:
        """Width of a pixel divided by its height."""
        return self._stream.sample_aspect_ratio or Fraction(1)

    def frames(self) -> Iterator[tuple[Timed, "av.VideoFrame"]]:
        """Yield the frames with their times, up to the first damage.

        Damaged frames at the beginning are left out: a recording may begin between two key frames.
        """
        gaps = _Gaps(self._interval)
        intact = False
        for index, (frame, held) in enumerate(self._decoded()):
            if not frame.is_corrupt:
                timed = self._time(frame.pts, frame.duration, index)
                if gaps.one_before(timed, at_end=held):
                    return
                intact = True
                yield timed, frame
            elif intact:
                return

    def packet_times(self, until: float | int | None) -> list[Timed]:
        """Return the times of the frames, read from their packets, in order.

        Args:
            until: seconds; later frames may be missing. None: all frames.
        """
        times: list[Timed] = []
        decoded = Fraction(0)
        for index, packet in enumerate(self._intact_packets()):
            if not packet.is_discard:
                times.append(self._time(packet.pts, packet.duration, index))
            # A frame is never shown before it is decoded.
            decoded = self._time(packet.dts, 0, index).time
            if until is not None and decoded > until:
                return sorted(times)
        gaps = _Gaps(self._interval)
        complete = itertools.takewhile(
            lambda x: not gaps.one_before(x, at_end=x.time > decoded), sorted(times)
        )
        return list(complete)

    def _decoded(self) -> Iterator[tuple["av.VideoFrame", bool]]:
        """Yield each frame, and whether the decoder held it back until the packets ended."""
        import av

        begun = False
        for packet in self._intact_packets():
            try:
                frames = self._stream.decode(packet)
            except av.FFmpegError:
                if begun:
                    break
                continue
            begun = begun or bool(frames)
            yield from ((x, False) for x in frames)
        with contextlib.suppress(av.FFmpegError):
            yield from ((x, True) for x in self._stream.decode(None))

    def _intact_packets(self) -> Iterator["Packet"]:
        import av

        with contextlib.suppress(av.FFmpegError):
            for packet in self._packets:
                end = packet.size == 0 and packet.dts is None  # PyAV marks it by an empty packet
                if end or packet.is_corrupt:
                    return
                yield packet

    def _time(self, pts: int | None, duration: int | None, index: int) -> Timed:
        base = self._stream.time_base
        if not self._timed or pts is None or base is None:
            return Timed(index * self._interval - self._start, self._interval)
        length = duration * base if duration else self._interval
        return Timed((pts - self._origin) * base - self._start, length)


class _Gaps:
    """Notices frames that are missing at the end of a file that was cut off.

    Frames are not stored in the order in which they are shown, so that the last frames that are left can be
    later ones than frames that are gone.
    """

    def __init__(self, interval: Fraction) -> None:
        self._before: Fraction | None = None
        self._largest = interval

    def one_before(self, timed: Timed, *, at_end: bool) -> bool:
        """Return whether frames are missing before this one, which is known at the end alone."""
        gap = timed.time - (timed.time if self._before is None else self._before)
        if at_end and gap > self._largest * Fraction(3, 2):
            return True
        self._before, self._largest = timed.time, max(self._largest, gap)
        return False


@contextlib.contextmanager
def opened(path: Path, start: float | int = 0.0) -> Iterator[Reader]:
    """Open the video stream of a file.

    Args:
        path: video file.
        start: seconds that times count from. Files with an index are read from the key frame before.

    Raises:
        BrokenFileError: the file cannot be opened, or has no video that can be decoded.
    """
    # First by the index. If that fails, or leads behind the start: from the beginning.
    for seek in (True, False) if start > 0 else (False,):
        with _stream(path) as stream:
            packets = stream.container.demux(stream)
            if seek:
                first = _sought(stream, packets, start)
                if first is None:
                    continue
                packets = itertools.chain([first], packets)
            yield Reader(stream, packets, start)
            return


def _sought(stream: Any, packets: Iterator["Packet"], start: float | int) -> Any:
    """Return the first packet after seeking; None: it is not the one of a frame at or before the start."""
    import av

    base = stream.time_base
    if base is None or stream.start_time is None or not _has_times(stream):
        return None
    target = stream.start_time + int(start / base)
    try:
        stream.container.seek(target, stream=stream)
        packet = next(packets, None)
    except av.FFmpegError:
        return None
    return (
        packet if packet is not None and packet.pts is not None and packet.pts <= target else None
    )


def _has_times(stream: Any) -> bool:
    """Return whether the container stores times. The frames of others are counted."""
    return stream.container.format.name not in _WITHOUT_TIMES


@contextlib.contextmanager
def _stream(path: Path) -> Iterator[Any]:
    try:
        import av
    except ImportError:
        raise ImportError(
            "videos are read with PyAV, which is not installed: pip install dit-accel[train]"
        ) from None
    try:
        # "file:" because ffmpeg takes a name such as "a:b.mp4" for a protocol.
        container = av.open(
            f"file:{path}",
            options={"format_whitelist": _FORMATS},
            metadata_errors="ignore",
        )
    except (av.FFmpegError, OSError) as error:
        raise BrokenFileError(f"{path}: not a readable video ({_reason(error)})") from None
    with container:
        stream = container.streams.best("video")
        if stream is None:
            raise BrokenFileError(f"{path}: has no video, only {_kinds(container)}")
        if stream.codec_context is None:
            raise BrokenFileError(f"{path}: the codec of its video is not supported by this PyAV")
        # One thread: several files are decoded at once, and threads of a decoder hide which frame is damaged.
        stream.codec_context.thread_count = 1
        stream.codec_context.thread_type = "NONE"
        yield stream


def _kinds(container: Any) -> str:
    return ", ".join(sorted({x.type for x in container.streams})) or "nothing"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
