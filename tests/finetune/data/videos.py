"""Video files made with PyAV, whose frames tell their number and their orientation."""

from fractions import Fraction

import numpy as np

MARK = 250
"""Brightness of the corner at the top left."""


def brightness(number):
    """Brightness of frame `number`, far enough from its neighbours for lossy codecs."""
    return 10 + 5 * number


def picture(number, height=48, width=64):
    """Return a grey frame with a red mark at the top left."""
    pixels = np.full((height, width, 3), brightness(number), np.uint8)
    pixels[: height // 4, : width // 4] = (MARK, 0, 0)
    return pixels


def number_of(frame):
    """Number of a frame, by the brightness of its lower right part."""
    height, width = frame.shape[:2]
    return round((float(frame[height // 2 :, width // 2 :].mean()) - 10) / 5)


def mark_of(frame):
    """Corner with the mark, as (is at the bottom, is at the right)."""
    corners = [(bottom, right) for bottom in (False, True) for right in (False, True)]
    return max(corners, key=lambda x: _redness(frame, *x))


def _redness(frame, bottom, right):
    h, w = frame.shape[0] // 8, frame.shape[1] // 8
    rows = slice(-h, None) if bottom else slice(0, h)
    columns = slice(-w, None) if right else slice(0, w)
    red, _, blue = frame[rows, columns].reshape(-1, 3).astype(float).mean(0)
    return red - blue


def write_clip(
    path,
    count=20,
    *,
    codec="libx264",
    height=48,
    width=64,
    fps=10,
    times=None,
    pix_fmt="yuv420p",
    rotation=None,
    hflip=False,
    aspect=None,
    audio=False,
    options=None,
    container_options=None,
    color_trc=None,
):
    """Write a clip of numbered frames.

    Args:
        times: time of each frame in milliseconds. Default: a constant rate.
        rotation: counter-clockwise degrees that players turn the frames by.
        aspect: width of a pixel divided by its height.
    """
    import av

    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        if rotation is not None or hflip:
            stream.set_display_rotation(rotation or 0, hflip=hflip)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        if color_trc is not None:
            stream.codec_context.color_trc = color_trc
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("aac", rate=16000, layout="mono") if audio else None
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(i, height, width), format="rgb24")
            frame = frame.reformat(format=pix_fmt)
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            samples = np.zeros((1, 16000 * count // fps), np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
    return path
