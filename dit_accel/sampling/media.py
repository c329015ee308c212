"""Video and image files: mp4, gif, png frames, side-by-side clips and contact sheets.

Frames are uint8 `[T, H, W, 3]`. All files are written atomically.
"""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from dit_accel.files import atomic_path

BACKGROUND = 24
"""Grey level of the space between images."""
Frames = UInt8[np.ndarray, "t h w 3"]


def to_uint8(frames: Float[np.ndarray, "t h w 3"]) -> Frames:
    """Convert frames in [0, 1] to 8 bits, rounded and clipped."""
    return np.rint(np.clip(frames, 0.0, 1.0) * 255.0).astype(np.uint8)


def enlarge(frames: Frames, smallest_side: int = 256) -> UInt8[np.ndarray, "t h_large w_large 3"]:
    """Enlarge tiny frames by an integer factor (nearest neighbour), up to about `smallest_side` pixels."""
    factor = max(1, smallest_side // min(frames.shape[1:3]))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def write_video(path: str | os.PathLike, frames: Frames, *, fps: int | float) -> None:
    """Write an H.264 mp4 (yuv420p, CRF 12, visually lossless).

    Raises:
        OSError: the file could not be written, or has fewer frames than the clip.
    """
    import imageio.v2 as imageio
    import imageio_ffmpeg

    with atomic_path(path) as temporary:
        with imageio.get_writer(
            temporary,
            fps=fps,
            codec="libx264",
            quality=None,
            macro_block_size=2,
            output_params=["-crf", "12"],
        ) as writer:
            for frame in frames:
                writer.append_data(frame)  # type: ignore[attr-defined]
        # imageio ignores errors of ffmpeg at the end, such as those of a full disk.
        temporary.stat()
        try:
            count, _ = imageio_ffmpeg.count_frames_and_secs(str(temporary))
        except RuntimeError:
            count = 0
        if count != len(frames):
            raise OSError(
                errno.EIO, f"ffmpeg wrote {count} of {len(frames)} frames; is the disk full?"
            )


def write_gif(path: str | os.PathLike, frames: Frames, *, fps: int | float) -> None:
    """Write an endless GIF. `fps` is approximate, because GIF stores durations in hundredths of a second."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    with atomic_path(path) as temporary:
        images[0].save(
            temporary, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0
        )


def write_png(path: str | os.PathLike, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Write one image as PNG."""
    from PIL import Image

    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary)


def write_clip(stem: Path, frames: Frames, *, kind: str, fps: int | float) -> list[Path]:
    """Write a clip or an image.

    Args:
        stem: path of the files without suffix.
        frames: frames of the clip; an image has one.
        kind: "mp4" or "gif" for one file, "png" for `stem.png` of one frame or `stem-000.png`, `stem-001.png`, ...
        fps: frame rate.

    Returns:
        The paths of the files.
    """
    if kind in ("mp4", "gif"):
        path = stem.with_name(
            f"{stem.name}.{kind}"
        )  # `with_suffix` would cut a stem that contains a dot
        (write_video if kind == "mp4" else write_gif)(path, frames, fps=fps)
        return [path]
    if len(frames) == 1:
        paths = [stem.with_name(f"{stem.name}.png")]
    else:
        paths = [stem.with_name(f"{stem.name}-{i:03d}.png") for i in range(len(frames))]
    for path, frame in zip(paths, frames, strict=True):
        write_png(path, frame)
    return paths


def titled(
    image: UInt8[np.ndarray, "h w 3"], title: str, height: int = 22
) -> UInt8[np.ndarray, "h2 w 3"]:
    """Add a dark strip with a title above an image."""
    from PIL import Image, ImageDraw

    strip = Image.new("RGB", (image.shape[1], height), (BACKGROUND,) * 3)
    ImageDraw.Draw(strip).text((6, 4), title, fill=(235, 235, 235))
    return np.concatenate([np.asarray(strip), image])


def side_by_side(
    clips: Sequence[tuple[str, Frames]], gap: int = 8
) -> UInt8[np.ndarray, "t h_all w_all 3"]:
    """Join titled clips side by side; tiny clips are enlarged."""
    rows = []
    for i in range(len(clips[0][1])):
        parts: list[np.ndarray] = []
        for title, frames in clips:
            picture = titled(enlarge(frames[i : i + 1])[0], title)
            parts += [picture, np.full((len(picture), gap, 3), BACKGROUND, np.uint8)]
        rows.append(np.concatenate(parts[:-1], axis=1))
    return np.stack(rows)


def contact_sheet(
    clips: Sequence[tuple[str, Frames]], columns: int = 8, tile: int = 128, gap: int = 4
) -> UInt8[np.ndarray, "h_all w_all 3"]:
    """Return an image with one row of evenly spaced frames per clip."""
    rows = []
    for title, frames in clips:
        chosen = np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)
        parts: list[np.ndarray] = []
        for frame in enlarge(frames[chosen], tile):
            parts += [frame, np.full((len(frame), gap, 3), BACKGROUND, np.uint8)]
        rows.append(titled(np.concatenate(parts[:-1], axis=1), title))
    return np.concatenate(rows)
