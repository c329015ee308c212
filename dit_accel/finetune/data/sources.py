"""Choose a bucket for each file of a data set, and read files as clips of that size."""

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from dit_accel.finetune.data.buckets import Bucket, SizeRules, fit, nearest_bucket, parse_buckets
from dit_accel.finetune.data.captions import Item, some
from dit_accel.finetune.data.pictures import picture_frames, probe_picture
from dit_accel.finetune.data.reader import BrokenFileError
from dit_accel.finetune.data.video import probe_video, video_frames

MOST_FRAMES = 1024
"""Largest number of frames of a clip if num_frames is not set. A longer clip would exhaust the memory."""


@dataclass(frozen=True)
class SizeChoice:
    """Settings that determine the bucket of each file."""

    rules: SizeRules
    """Sizes that the model supports."""
    buckets: tuple[Bucket, ...] = ()
    """Buckets to choose from. Each file uses the nearest bucket. Empty: height, width and num_frames apply."""
    height: int | None = None
    """Height of every sample in pixels. None: the height of the file, rounded down to a supported size."""
    width: int | None = None
    """Width of every sample in pixels. None: the width of the file, rounded down to a supported size."""
    num_frames: int | None = None
    """Number of frames of every sample. None: the largest supported number that the file has."""
    fps: float | int | None = None
    """Frame rate to which videos are resampled. None keeps the frames of each file."""

    def bucket(self, frames: int, height: int, width: int) -> Bucket | None:
        """Return the bucket of a file, or None if the file has too few frames or pixels."""
        if self.buckets:
            return nearest_bucket(frames, height, width, self.buckets)
        if self.num_frames is not None and frames < self.num_frames:
            return None
        return self.rules.largest(
            self.num_frames or frames, self.height or height, self.width or width
        )

    def settings(self) -> dict[str, Any]:
        """Return all settings that affect the pixels of a sample, as plain values."""
        return {
            "buckets": [str(x) for x in self.buckets],
            "height": self.height,
            "width": self.width,
            "num_frames": self.num_frames,
            "fps": self.fps,
        }


@dataclass(frozen=True)
class Source:
    """File, or part of a file, with the bucket to which it is cropped."""

    item: Item
    bucket: Bucket


def size_choice(
    rules: SizeRules,
    *,
    buckets: str | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    fps: float | int | None = None,
) -> SizeChoice:
    """Check the options that set sizes, and return them as a `SizeChoice`.

    Args:
        rules: sizes that the model supports.
        buckets: buckets of the form "frames,height,width;...". Each file uses the nearest bucket.
        height: height of every sample in pixels. Cannot be combined with `buckets`.
        width: width of every sample in pixels. Cannot be combined with `buckets`.
        num_frames: number of frames of every sample. Cannot be combined with `buckets`.
        fps: frame rate to which videos are resampled. Default: keep the frames of each file.

    Raises:
        ValueError: if the model does not support a size, or if options contradict each other.
    """
    given = {"height": height, "width": width, "num_frames": num_frames}
    if buckets is not None and any(x is not None for x in given.values()):
        names = ", ".join(f"{k}={x}" for k, x in given.items() if x is not None)
        raise ValueError(f"buckets={buckets!r}, {names}: set either buckets or one size, not both")
    if (height is None) != (width is None):
        raise ValueError(f"height={height}, width={width}: set both or neither")
    if fps is not None:
        from dit_accel.sampling.settings import check_fps

        check_fps(fps)
    if buckets is not None:
        return SizeChoice(rules, parse_buckets(buckets, rules), fps=fps)
    size = Bucket(num_frames or 1, height or rules.multiple, width or rules.multiple)
    rules.check(size, "height, width, num_frames")
    return SizeChoice(rules, (), height, width, num_frames, fps)


def find_sources(
    items: Sequence[Item],
    sizes: SizeChoice,
    *,
    workers: int = 4,
    skip_broken: bool = False,
    progress: bool = False,
) -> tuple[list[Source], dict[str, str]]:
    """Open every file, and choose its bucket.

    Args:
        items: captioned files.
        sizes: settings that determine the buckets.
        workers: number of files that are opened in parallel.
        skip_broken: skip files that cannot be used. Default: raise an error.
        progress: show a progress bar on stderr.

    Returns:
        The sources in the order of the items, and the error message of each skipped file by id.

    Raises:
        ValueError: if a file cannot be used and `skip_broken` is False, if a bucket has no file, or if no file can be
            used.
    """
    from tqdm import tqdm

    # The delay hides the bar of short checks.
    bar: dict[str, Any] = {"disable": not progress, "unit": "file", "delay": 1.0, "leave": False}
    sources: list[Source] = []
    broken: dict[str, str] = {}
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(functools.partial(_source_or_error, sizes), items)
        for item, result in zip(
            items,
            tqdm(found, "checking files", len(items), **bar),
            strict=True,
        ):
            if isinstance(result, Source):
                sources.append(result)
            else:
                broken[item.id] = str(result)
    if broken and not skip_broken:
        raise ValueError(
            f"{len(broken)} of {len(items)} files cannot be used: {some(broken.values(), 3)}; repair or remove them, or skip "
            "them with `dit-accel precompute --skip-broken`"
        )
    if not sources:
        raise ValueError(f"none of the {len(items)} files can be used: {some(broken.values(), 3)}")
    taken = {x.bucket for x in sources}
    empty = [str(x) for x in sizes.buckets if x not in taken]
    if empty:
        raise ValueError(
            f"buckets: no file uses {', '.join(empty)} (frames x height x width); remove unused buckets. The files use "
            f"{', '.join(map(str, sorted(taken)))}"
        )
    return sources, broken


def read_clip(source: Source, fps: float | int | None) -> UInt8[np.ndarray, "f h w 3"]:
    """Decode a file, and crop it to its bucket.

    Raises:
        BrokenFileError: if the file cannot be decoded, or if it has too few frames for its bucket.
    """
    bucket = source.bucket
    pictures: list[np.ndarray] = []
    before: np.ndarray | None = None
    for frame in _frames(source.item, fps):
        repeated = bool(pictures) and frame is before
        pictures.append(pictures[-1] if repeated else fit(frame, bucket.height, bucket.width))
        before = frame
        if len(pictures) == bucket.frames:
            return np.stack(pictures)
    raise BrokenFileError(
        f"{source.item.path}: only {len(pictures)} of {bucket.frames} frames could be decoded; the file may be damaged"
    )


def _frames(item: Item, fps: float | int | None) -> Iterator[np.ndarray]:
    if item.is_picture:
        return picture_frames(item.path, fps=fps)
    return video_frames(item.path, fps=fps, start=item.start, end=item.end)


def _source_or_error(sizes: SizeChoice, item: Item) -> Source | BrokenFileError:
    try:
        return _source(sizes, item)
    except BrokenFileError as error:
        return error


def _source(sizes: SizeChoice, item: Item) -> Source:
    most = max((x.frames for x in sizes.buckets), default=sizes.num_frames or MOST_FRAMES + 1)
    if sizes.rules.frame_step == 0:
        most = 1
    if item.is_picture:
        height, width, frames = probe_picture(item.path, fps=sizes.fps)
    else:
        height, width, frames = probe_video(
            item.path, fps=sizes.fps, start=item.start, end=item.end, most=most
        )
    bucket = sizes.bucket(frames, height, width)
    size = f"{frames} frames of {height} x {width}"
    if bucket is None:
        least = min((x.frames for x in sizes.buckets), default=sizes.num_frames or 1)
        reason = (
            f"at least {least} frames"
            if frames < least
            else f"at least {sizes.rules.multiple} pixels a side"
        )
        rate = "" if sizes.fps is None else f" at {sizes.fps:g} frames per second"
        raise BrokenFileError(f"{item.path}: {size}{rate}; expected {reason}")
    if bucket.frames > MOST_FRAMES and not sizes.buckets and sizes.num_frames is None:
        raise BrokenFileError(
            f"{item.path}: more than {MOST_FRAMES} frames; set --num-frames or --buckets"
        )
    return Source(item, bucket)
