"""Sample sets: folders of images or clips, matched by id, read as raw frames."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from dit_accel.sampling.manifest import JOURNAL, MANIFEST, listed_frames, read_manifest
from dit_accel.sampling.pictures import VIDEO_SUFFIXES, read_image
from dit_accel.sampling.scan import scan_folder, some_names
from dit_accel.sampling.settings import Kind


class SampleSet:
    """A folder of images or of clips.

    With manifest.json: what `eval.generate` wrote. Without: each picture (`pictures.IMAGE_SUFFIXES`) is an
    image and its id is its path without the suffix; a sub-folder of pictures named by numbers is a clip. Other
    pictures are left out with a note on stderr. Nothing but names is read before `frames`.
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
        """Return the set in this folder.

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
                name: listed_frames(folder, name, sample)
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
        kind, files = scan_folder(folder)
        return cls(folder, kind, files)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"SampleSet({str(self.path)!r}, {len(self)} {self.kind})"

    def files(self, id: str) -> tuple[Path, ...]:  # noqa: A002  # it is called id everywhere
        """Return the files of the frames in order; an image has one."""
        try:
            return self._files[id]
        except KeyError:
            raise ValueError(f"id={id!r}: not in {self.path}") from None

    def media(self, id: str) -> Path:  # noqa: A002
        """Return the file to look at: the picture, or the mp4 of a clip (the first frame without one)."""
        first = self.files(id)[0]
        if self.kind == "images":
            return first
        named = [] if self.manifest is None else self.manifest["samples"][id]["files"]
        videos = [self.path / x for x in named if Path(x).suffix.lower() in VIDEO_SUFFIXES]
        videos.append(first.parent.with_name(f"{first.parent.name}.mp4"))
        return next((x for x in videos if x.is_file()), first)

    def frames(self, id: str) -> UInt8[np.ndarray, "t h w 3"]:  # noqa: A002
        """Return the raw frames; an image has one.

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
    """Return the ids of the samples to compare, sorted.

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
            left_out.append(f"{len(alone)} only in {own.path} ({some_names(alone)})")
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


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
