"""`opened`: read the frames and timestamps of a video file up to its first damaged frame."""

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
"""Supported containers. Playlists are excluded, because ffmpeg would read other files and the network."""
_WITHOUT_TIMES = ("avi", "h264", "hevc", "m4v", "mpegvideo", "obu", "yuv4mpegpipe")
"""Containers without timestamps. ffmpeg guesses them for AVI, but incorrectly if frames are reordered."""


class BrokenFileError(ValueError):
    """Error for a file of the data set that cannot be used. The message names the file."""


class Reader:
    """Reader of one open video stream."""

    def __init__(self, stream: Any, packets: Iterator["Packet"], start: float | int) -> None:
        """Create a reader.

        Args:
            stream: the video stream.
            packets: packets of the stream. The first packet is at or before `start`.
            start: time in seconds that becomes time 0 of the returned frames.
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
        """Aspect ratio of a pixel: width divided by height."""
        return self._stream.sample_aspect_ratio or Fraction(1)

    def frames(self) -> Iterator[tuple[Timed, "av.VideoFrame"]]:
        """Yield the frames with their timestamps, up to the first damaged frame.

        Damaged frames at the start are skipped, because a recording may start between two key frames.
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
        """Return the sorted timestamps of the frames, read from their packets without decoding.

        Args:
            until: time in seconds after which frames may be missing. None returns all frames.
        """
        times: list[Timed] = []
        decoded = Fraction(0)
        for index, packet in enumerate(self._intact_packets()):
            if not packet.is_discard:
                times.append(self._time(packet.pts, packet.duration, index))
            # A frame is never shown before it is decoded, so all frames up to this time are known.
            decoded = self._time(packet.dts, 0, index).time
            if until is not None and decoded > until:
                return sorted(times)
        gaps = _Gaps(self._interval)
        complete = itertools.takewhile(
            lambda x: not gaps.one_before(x, at_end=x.time > decoded), sorted(times)
        )
        return list(complete)

    def _decoded(self) -> Iterator[tuple["av.VideoFrame", bool]]:
        """Yield each frame with a flag that is True if the decoder returned it only after the last packet."""
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
                end = (
                    packet.size == 0 and packet.dts is None
                )  # PyAV marks the end by an empty packet
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
    """Detect missing frames at the end of a truncated file.

    Frames are not stored in display order. The last stored frames of a truncated file may therefore be later in the
    video than some missing frames.
    """

    def __init__(self, interval: Fraction) -> None:
        self._before: Fraction | None = None
        self._largest = interval

    def one_before(self, timed: Timed, *, at_end: bool) -> bool:
        """Return True if frames are missing before this frame. Gaps are detected only at the end of the file.

        Args:
            timed: timestamp of the frame.
            at_end: True if the frame was returned after the last packet.
        """
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
        start: time in seconds that becomes time 0. Files with an index are read from the key frame before it.

    Raises:
        BrokenFileError: if the file cannot be opened, or if it has no video that can be decoded.
    """
    # Seek by the index first. If that fails, or ends after `start`, read from the beginning.
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
    """Seek, and return the first packet. Return None if its frame is not at or before the start."""
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
    """Return True if the container stores timestamps. Otherwise they are derived from the frame index."""
    return stream.container.format.name not in _WITHOUT_TIMES


@contextlib.contextmanager
def _stream(path: Path) -> Iterator[Any]:
    try:
        import av
    except ImportError:
        raise ImportError(
            "reading videos requires the package av (pip install dit-accel[train])"
        ) from None
    try:
        # Prefix "file:", because ffmpeg would read "a" of a name such as "a:b.mp4" as a protocol.
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
            raise BrokenFileError(
                f"{path}: has no video stream; its streams are: {_kinds(container)}"
            )
        if stream.codec_context is None:
            raise BrokenFileError(f"{path}: the installed PyAV does not support its video codec")
        # One thread: files are decoded in parallel, and decoder threads hide which frame is damaged.
        stream.codec_context.thread_count = 1
        stream.codec_context.thread_type = "NONE"
        yield stream


def _kinds(container: Any) -> str:
    return ", ".join(sorted({x.type for x in container.streams})) or "none"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
