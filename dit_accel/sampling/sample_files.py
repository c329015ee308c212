"""Files of the samples of a set: writing, checking, and removing those of a replaced set."""

import contextlib
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from dit_accel.files import atomic_directory
from dit_accel.sampling import media
from dit_accel.sampling.image_files import is_image_file, read_image
from dit_accel.sampling.journal import EarlierRuns, Shards, remove_stale
from dit_accel.sampling.manifest import is_inside
from dit_accel.sampling.plan import Sample
from dit_accel.sampling.settings import Kind

Pictures = UInt8[np.ndarray, "t h w 3"]


def write_sample(
    folder: Path, sample: Sample, pictures: Pictures, *, kind: Kind, fps: float | int
) -> list[str]:
    """Write `<id>.png` of an image, or the frames and the mp4 file of a clip. Each is written atomically.

    Args:
        folder: folder of the sample set.
        sample: sample whose files are written.
        pictures: frames of the sample; an image has one.
        kind: "images" or "clips".
        fps: frame rate of the mp4 file.

    Returns:
        The paths of the files, relative to the folder.
    """
    if kind == "images":
        name = f"{sample.id}.png"
        media.write_png(folder / name, pictures[0])
        return [name]
    video = folder / sample.video
    video.parent.mkdir(exist_ok=True)
    media.write_video(video, pictures, fps=fps)
    place = folder / sample.id
    if _is_clip(place):  # left by a run that was killed before it wrote its journal
        shutil.rmtree(place)
    names = [f"{i:04d}.png" for i in range(len(pictures))]
    with atomic_directory(place) as temporary:
        for name, picture in zip(names, pictures, strict=True):
            media.write_png(temporary / name, picture)
    return [*(f"{sample.id}/{name}" for name in names), sample.video]


def frames_sha256(frames: Pictures) -> str:
    """Return a hash of the pixels. It does not depend on the file format."""
    return hashlib.sha256(np.ascontiguousarray(frames).tobytes()).hexdigest()


def is_intact(folder: Path, record: dict[str, Any]) -> bool:
    """Return whether the files of a record exist and have the recorded pixels."""
    try:
        files = [folder / file for file in record["files"] if is_inside(file)]
        frames = [read_image(x) for x in files if is_image_file(x)]
        if any(x.stat().st_size == 0 for x in files):
            return False
        return frames_sha256(np.stack(frames)) == record["sha256"]
    except (KeyError, TypeError, ValueError, OSError):
        return False


def check_free(folder: Path, own: Sequence[Sample], samples: Sequence[Sample], kind: Kind) -> None:
    """Check that a folder without earlier runs has no files that the samples would replace or hide.

    Args:
        folder: folder of the sample set.
        own: samples of this rank.
        samples: samples of all ranks, because another rank may already have written files.
        kind: "images" or "clips".

    Raises:
        ValueError: the folder has a file of the same name, or other images.
    """
    for sample in own:
        for name in _places(sample, kind):
            if (folder / name).exists():
                raise ValueError(
                    f"output_dir={str(folder)!r}: already contains {name}; choose another folder or set overwrite"
                )
    # With a manifest, `SampleSet.open` would no longer find these images.
    planned = {name for sample in samples for name in _places(sample, kind)}
    for path in sorted(folder.iterdir()):
        strange = path.name not in planned and not path.name.startswith(".")
        if strange and is_image_file(path):
            raise ValueError(
                f"output_dir={str(folder)!r}: contains other images, such as {path.name}; choose another folder"
            )


def remove_old(
    folder: Path, found: EarlierRuns, samples: Sequence[Sample], shards: Shards, kind: Kind
) -> None:
    """Remove the files of samples with other settings. Files that another rank will write are left to that rank.

    Args:
        folder: folder of the sample set.
        found: samples and files of earlier runs.
        samples: samples of all ranks.
        shards: assignment of samples to ranks.
        kind: "images" or "clips".
    """
    foreign = [x for x in samples if shards.owner[x.id] != shards.rank]
    spared = {place for x in foreign for place in _places(x, kind)}
    for file in found.old_files:
        if file in spared or file.split("/")[0] in spared:
            continue
        (folder / file).unlink(missing_ok=True)
        if "/" in file:
            with contextlib.suppress(OSError):  # not empty yet
                (folder / file).parent.rmdir()
    remove_stale(folder, found, shards)


def _places(sample: Sample, kind: Kind) -> list[str]:
    """Return the names of the files and folders of a sample."""
    return [f"{sample.id}.png"] if kind == "images" else [sample.id, sample.video]


def _is_clip(place: Path) -> bool:
    """Return whether a folder contains only numbered frames, so that removing it deletes no other images."""
    return (
        place.is_dir()
        and not place.is_symlink()
        and all(x.suffix == ".png" and x.stem.isdigit() for x in place.iterdir())
    )
