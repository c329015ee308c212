"""Search for the images or clips in a folder without a manifest."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from dit_accel.sampling.image_files import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    is_image_file,
    is_unread_image_file,
)
from dit_accel.sampling.settings import Kind


def scan_folder(folder: Path) -> tuple[Kind, dict[str, tuple[Path, ...]]]:
    """Return the kind of the samples in a folder without a manifest, and their files by id.

    Raises:
        ValueError: the folder has no images, has both images and clips, two files with the same id, videos without
            frames, or a clip with a missing frame.
    """
    images: dict[str, tuple[Path, ...]] = {}
    clips: dict[str, tuple[Path, ...]] = {}
    videos: list[Path] = []
    unread: list[Path] = []
    for place, names in _walk(folder):
        pictures = [x for x in names if is_image_file(x)]
        videos += [x for x in names if x.suffix.lower() in VIDEO_SUFFIXES]
        unread += [x for x in names if is_unread_image_file(x)]
        if not pictures:
            continue
        if place != folder and all(_is_number(x.stem) for x in pictures):
            clips[place.relative_to(folder).as_posix()] = _in_order(pictures)
            continue
        for picture in pictures:
            name = picture.relative_to(folder).with_suffix("").as_posix()
            if name in images:
                raise ValueError(
                    f"{picture}: has the same id {name!r} as {images[name][0].name}; ids must be unique"
                )
            images[name] = (picture,)
    for video in videos:
        if video.relative_to(folder).with_suffix("").as_posix() not in clips:
            raise ValueError(
                f"{video}: video without frames; metrics read raw frames, because video coding changes them. Must have a "
                f"folder {video.stem}/ of 0000.png, 0001.png, ..."
            )
    if images and clips:
        raise ValueError(
            f"{folder}: contains images ({some_names(sorted(images))}) and clips ({some_names(sorted(clips))}); must "
            "contain only one kind"
        )
    left_out = _by_suffix(unread, folder)
    if not images and not clips:
        beside = f", only {left_out}" if left_out else ""
        raise ValueError(f"{folder}: contains no {', '.join(IMAGE_SUFFIXES)} file{beside}")
    if left_out:
        sys.stderr.write(
            f"note: {folder}: ignored {left_out}; images are read from {', '.join(IMAGE_SUFFIXES)} files\n"
        )
    return ("clips", clips) if clips else ("images", images)


def _by_suffix(files: list[Path], folder: Path) -> str:
    """Return text that lists the files, grouped by suffix."""
    groups: dict[str, list[str]] = {}
    for file in files:
        groups.setdefault(file.suffix.lower(), []).append(file.relative_to(folder).as_posix())
    return "; ".join(f"{len(x)} {suffix} ({some_names(x)})" for suffix, x in sorted(groups.items()))


def _walk(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield each folder and its files. Hidden files and folders are skipped."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(x for x in folders if not x.startswith("."))
        yield Path(place), [Path(place) / x for x in sorted(names) if not x.startswith(".")]


def _is_number(stem: str) -> bool:
    return stem.isascii() and stem.isdigit()


def _in_order(frames: list[Path]) -> tuple[Path, ...]:
    """Return frames in the order of their numbers; raise ValueError if a number is missing or occurs twice."""
    ordered = sorted(frames, key=lambda x: int(x.stem))
    numbers = [int(x.stem) for x in ordered]
    for number, expected in zip(numbers, range(numbers[0], numbers[0] + len(numbers)), strict=True):
        if number != expected:
            wrong = f"{number} occurs twice" if number < expected else f"{expected} is missing"
            raise ValueError(
                f"{frames[0].parent}: files named by numbers are read as the frames of a clip, and {wrong}; open that "
                "folder itself if they are images"
            )
    return tuple(ordered)


def some_names(ids: list[str], limit: int = 5) -> str:
    """Return text with the first `limit` names and the number of further names."""
    more = f", and {len(ids) - limit} more" if len(ids) > limit else ""
    return ", ".join(repr(x) for x in ids[:limit]) + more
