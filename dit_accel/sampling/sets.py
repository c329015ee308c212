"""Sample sets: folders of images or clips, matched by id, read as raw frames."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
JOURNAL = "manifest.rank{}.jsonl"
"""What a rank has finished while it runs, a line each; merged into MANIFEST."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4", ".gif", ".webm", ".mov", ".mkv", ".avi")
Kind = Literal["images", "clips"]


class SampleSet:
    """A folder of images or of clips.

    With manifest.json: what `eval.generate` wrote. Without: each png, jpg, jpeg or webp file is an
    image and its id is its path without the suffix; a sub-folder of such files named by numbers is a
    clip. Nothing but names is read before `frames`.
    """

    path: Path
    kind: Kind
    ids: tuple[str, ...]
    """Sorted."""
    prompts: dict[str, str]
    """By id; empty where the folder does not tell."""
    manifest: dict[str, Any] | None

    def __init__(
        self,
        path: Path,
        kind: Kind,
        files: dict[str, tuple[Path, ...]],
        prompts: dict[str, str] | None = None,
        manifest: dict[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.kind = kind
        self.ids = tuple(sorted(files))
        self.prompts = prompts or {}
        self.manifest = manifest
        self._files = files

    @classmethod
    def open(cls, path: str | os.PathLike) -> "SampleSet":
        """The set in this folder.

        Raises:
            ValueError: no folder, nothing in it, a manifest that is damaged or names missing files, an
                unfinished run, images beside clips, or videos without frames.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise ValueError(f"path={str(path)!r}: accepted is a folder of images or clips")
        if (folder / MANIFEST).is_file():
            manifest = read_manifest(folder)
            files = {
                name: _frame_files(folder, name, sample)
                for name, sample in manifest["samples"].items()
            }
            prompts = {
                name: sample["prompt"]
                for name, sample in manifest["samples"].items()
                if isinstance(sample.get("prompt"), str)
            }
            return cls(folder, manifest["kind"], files, prompts, manifest)
        if unfinished := sorted(p.name for p in folder.glob(JOURNAL.format("*"))):
            raise ValueError(
                f"path={str(path)!r}: holds {unfinished[0]} and no {MANIFEST}, so generation has not "
                "finished; run it again to go on"
            )
        kind, files = _scan(folder)
        return cls(folder, kind, files)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"SampleSet({str(self.path)!r}, {len(self)} {self.kind})"

    def files(self, id: str) -> tuple[Path, ...]:  # noqa: A002  # it is called id everywhere
        """The frames in order; one of an image."""
        try:
            return self._files[id]
        except KeyError:
            raise ValueError(f"id={id!r}: not in {self.path}") from None

    def media(self, id: str) -> Path:  # noqa: A002
        """What a person looks at: the picture, or the mp4 of a clip (the first frame without one)."""
        first = self.files(id)[0]
        if self.kind == "images":
            return first
        named = [] if self.manifest is None else self.manifest["samples"][id]["files"]
        videos = [self.path / x for x in named if Path(x).suffix.lower() in VIDEO_SUFFIXES]
        videos.append(first.parent.with_name(f"{first.parent.name}.mp4"))
        return next((x for x in videos if x.is_file()), first)

    def frames(self, id: str) -> UInt8[np.ndarray, "t h w 3"]:  # noqa: A002
        """Raw frames; an image has one.

        Raises:
            ValueError: no such id; a file that is unreadable or truncated; frames of different sizes.
        """
        files = self.files(id)
        first = read_image(files[0])
        frames = np.empty((len(files), *first.shape), np.uint8)
        frames[0] = first
        for i, file in enumerate(files[1:], start=1):
            image = read_image(file)
            if image.shape != first.shape:
                raise ValueError(
                    f"{file}: {_size(image)} pixels, and {files[0].name} of the same clip has {_size(first)}; "
                    "accepted are frames of one size"
                )
            frames[i] = image
        return frames


def pair_ids(a: SampleSet, b: SampleSet, *, allow_partial: bool = False) -> tuple[str, ...]:
    """Ids of the samples to compare, sorted.

    Args:
        allow_partial: leave out what only one of them has, with a note on stderr.

    Raises:
        ValueError: images against clips, no id in common, or ids that only one has.
    """
    if a.kind != b.kind:
        raise ValueError(
            f"{a.path} holds {a.kind} and {b.path} holds {b.kind}; accepted are two of one kind"
        )
    common = sorted(set(a.ids) & set(b.ids))
    left_out = []
    for own, other in ((a, b), (b, a)):
        if alone := sorted(set(own.ids) - set(other.ids)):
            left_out.append(f"{len(alone)} only in {own.path} ({_some(alone)})")
    if not common:
        raise ValueError(f"the two sets have no id in common: {'; '.join(left_out)}")
    if left_out and not allow_partial:
        raise ValueError(
            f"the ids of the two sets differ: {'; '.join(left_out)}; give both the same ids, or allow "
            "partial pairs"
        )
    if left_out:
        sys.stderr.write(f"note: {len(common)} pairs; left out: {'; '.join(left_out)}\n")
    return tuple(common)


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json, its form checked but not its files.

    Raises:
        ValueError: it is damaged or of another version.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version={version!r}; accepted is {FORMAT_VERSION}")
    if manifest.get("kind") not in ("images", "clips"):
        raise ValueError(f"{path}: kind={manifest.get('kind')!r}; accepted are images, clips")
    samples = manifest.get("samples")
    if not isinstance(samples, dict) or not samples:
        raise ValueError(f"{path}: accepted is a manifest with at least one sample")
    for name, sample in samples.items():
        files = sample.get("files") if isinstance(sample, dict) else None
        if not isinstance(files, list) or not all(isinstance(x, str) for x in files):
            raise ValueError(f"{path}: sample {name!r} has no list of files")
    return manifest


def read_image(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """One picture as RGB.

    Raises:
        ValueError: it is unreadable or truncated, or RGB of 8 bits would not be the picture.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            lost = _lost_in_rgb(image)
            pixels = np.array(image.convert("RGB"))
    # What Pillow raises depends on where a damaged file breaks off.
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from None
    if lost is not None:
        raise ValueError(f"{path}: {lost}; accepted are 8 bits a channel, opaque")
    return pixels


def _lost_in_rgb(image: Any) -> str | None:
    """What the conversion would drop without a word."""
    # The tile names the mode in the file: Pillow opens RGB of 16 bits as RGB.
    if image.mode in ("I", "F") or ";16" in f"{image.mode} {image.tile}":
        return f"a picture of more than 8 bits a channel (mode {image.mode})"
    if image.has_transparency_data and np.array(image.convert("RGBA"))[..., 3].min() < 255:
        return f"a picture with transparent pixels (mode {image.mode})"
    return None


def _frame_files(folder: Path, name: str, sample: dict[str, Any]) -> tuple[Path, ...]:
    for file in sample["files"]:
        place = PurePosixPath(file)
        if place.is_absolute() or ".." in place.parts or "\\" in file:
            raise ValueError(
                f"{folder / MANIFEST}: file {file!r} of {name!r} is outside the folder"
            )
    frames = [folder / x for x in sample["files"] if Path(x).suffix.lower() in IMAGE_SUFFIXES]
    if not frames:
        raise ValueError(f"{folder / MANIFEST}: sample {name!r} has no frames")
    for frame in frames:
        if not frame.is_file():
            raise ValueError(f"{frame}: named in {MANIFEST} but missing; run generation again")
    return tuple(frames)


def _scan(folder: Path) -> tuple[Kind, dict[str, tuple[Path, ...]]]:
    images: dict[str, tuple[Path, ...]] = {}
    clips: dict[str, tuple[Path, ...]] = {}
    videos: list[Path] = []
    for place, names in _walk(folder):
        pictures = [x for x in names if x.suffix.lower() in IMAGE_SUFFIXES]
        videos += [x for x in names if x.suffix.lower() in VIDEO_SUFFIXES]
        if not pictures:
            continue
        if place != folder and all(_is_number(x.stem) for x in pictures):
            clips[place.relative_to(folder).as_posix()] = _in_order(pictures)
            continue
        for picture in pictures:
            name = picture.relative_to(folder).with_suffix("").as_posix()
            if name in images:
                raise ValueError(
                    f"{picture}: has the id {name!r} of {images[name][0].name}; accepted are different names"
                )
            images[name] = (picture,)
    for video in videos:
        if video.relative_to(folder).with_suffix("").as_posix() not in clips:
            raise ValueError(
                f"{video}: a video without its frames; metrics read raw frames, because video coding changes "
                f"them. Accepted is a folder {video.stem}/ of 0000.png, 0001.png, ..."
            )
    if images and clips:
        raise ValueError(
            f"{folder}: images ({_some(sorted(images))}) beside clips ({_some(sorted(clips))}); accepted is "
            "one kind"
        )
    if not images and not clips:
        raise ValueError(f"{folder}: holds no {', '.join(IMAGE_SUFFIXES)} file")
    return ("clips", clips) if clips else ("images", images)


def _walk(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Each folder with its files; hidden ones are somebody's working files."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(x for x in folders if not x.startswith("."))
        yield Path(place), [Path(place) / x for x in sorted(names) if not x.startswith(".")]


def _is_number(stem: str) -> bool:
    return stem.isascii() and stem.isdigit()


def _in_order(frames: list[Path]) -> tuple[Path, ...]:
    ordered = sorted(frames, key=lambda x: int(x.stem))
    numbers = [int(x.stem) for x in ordered]
    for number, expected in zip(numbers, range(numbers[0], numbers[0] + len(numbers)), strict=True):
        if number != expected:
            wrong = f"{number} comes twice" if number < expected else f"{expected} is missing"
            raise ValueError(
                f"{frames[0].parent}: files named by numbers are the frames of a clip, and {wrong}; open that "
                "folder itself if they are images"
            )
    return tuple(ordered)


def _some(ids: list[str], limit: int = 5) -> str:
    more = f", and {len(ids) - limit} more" if len(ids) > limit else ""
    return ", ".join(repr(x) for x in ids[:limit]) + more


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
