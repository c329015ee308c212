"""Sample sets: folders of images or clips that are read as raw frames and compared by id."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from dit_accel.sampling.image_files import VIDEO_SUFFIXES, read_image
from dit_accel.sampling.manifest import JOURNAL, MANIFEST, listed_frames, read_manifest
from dit_accel.sampling.scan import scan_folder, some_names
from dit_accel.sampling.settings import Kind


class SampleSet:
    """Folder of images or of clips.

    If the folder has a manifest.json, which `eval.generate` writes, the set has the samples of the manifest. Otherwise each
    image file (`image_files.IMAGE_SUFFIXES`) is an image whose id is its path without the suffix, and each sub-folder of
    image files named by numbers is a clip. Other image formats are ignored with a note on stderr. Only file names are
    read until `frames` is called.
    """

    path: Path
    kind: Kind
    ids: tuple[str, ...]
    """Ids of the samples, sorted."""
    prompts: dict[str, str]
    """Prompt of each sample by id. Empty without a manifest."""
    manifest: dict[str, Any] | None
    """Content of manifest.json, or None."""

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
        """Open a folder as a sample set.

        Raises:
            ValueError: the folder does not exist, has no samples, has a damaged manifest or an unfinished run, lacks files
                of the manifest, has both images and clips, or has videos without frames.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise ValueError(f"path={str(path)!r}: must be a folder of images or clips")
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
                f"path={str(path)!r}: contains {unfinished[0]} and no {MANIFEST}, so generation is not finished; run it "
                "again to resume"
            )
        kind, files = scan_folder(folder)
        return cls(folder, kind, files)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"SampleSet({str(self.path)!r}, {len(self)} {self.kind})"

    def files(self, id: str) -> tuple[Path, ...]:  # noqa: A002  # the manifest and the prompts use this name
        """Return the files of the frames of a sample in order. An image has one file."""
        try:
            return self._files[id]
        except KeyError:
            raise ValueError(f"id={id!r}: not a sample of {self.path}") from None

    def media(self, id: str) -> Path:  # noqa: A002
        """Return the file to show: an image, the mp4 file of a clip, or the first frame of a clip without mp4 file."""
        first = self.files(id)[0]
        if self.kind == "images":
            return first
        named = [] if self.manifest is None else self.manifest["samples"][id]["files"]
        videos = [self.path / x for x in named if Path(x).suffix.lower() in VIDEO_SUFFIXES]
        videos.append(first.parent.with_name(f"{first.parent.name}.mp4"))
        return next((x for x in videos if x.is_file()), first)

    def frames(self, id: str) -> UInt8[np.ndarray, "t h w 3"]:  # noqa: A002
        """Return the raw frames of a sample. An image has one frame.

        Raises:
            ValueError: there is no such id, a file is unreadable or truncated, or the frames have different sizes.
        """
        files = self.files(id)
        first = read_image(files[0])
        frames = np.empty((len(files), *first.shape), np.uint8)
        frames[0] = first
        for i, file in enumerate(files[1:], start=1):
            image = read_image(file)
            if image.shape != first.shape:
                raise ValueError(
                    f"{file}: {_size(image)} pixels, and {files[0].name} of the same clip has {_size(first)}; all frames "
                    "must have the same size"
                )
            frames[i] = image
        return frames


def pair_ids(a: SampleSet, b: SampleSet, *, allow_partial: bool = False) -> tuple[str, ...]:
    """Return the ids that two sets have in common, sorted.

    Args:
        a, b: the two sets.
        allow_partial: ignore samples that only one set has, with a note on stderr.

    Raises:
        ValueError: the sets have different kinds or no common ids, or one set has further ids and `allow_partial` is False.
    """
    if a.kind != b.kind:
        raise ValueError(
            f"{a.path} contains {a.kind} and {b.path} contains {b.kind}; both must be of the same kind"
        )
    common = sorted(set(a.ids) & set(b.ids))
    left_out = []
    for own, other in ((a, b), (b, a)):
        if alone := sorted(set(own.ids) - set(other.ids)):
            left_out.append(f"{len(alone)} only in {own.path} ({some_names(alone)})")
    if not common:
        raise ValueError(f"the two sets have no common ids: {'; '.join(left_out)}")
    if left_out and not allow_partial:
        raise ValueError(
            f"the ids of the two sets differ: {'; '.join(left_out)}; ids must be the same unless allow_partial is set"
        )
    if left_out:
        sys.stderr.write(f"note: {len(common)} pairs; ignored: {'; '.join(left_out)}\n")
    return tuple(common)


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
