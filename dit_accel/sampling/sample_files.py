"""Files of the samples of a set: written whole, checked, and removed where a set is replaced."""

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
from dit_accel.sampling.journal import Found, Shards, remove_stale
from dit_accel.sampling.manifest import is_inside
from dit_accel.sampling.pictures import is_picture, read_image
from dit_accel.sampling.plan import Sample
from dit_accel.sampling.settings import Kind

Pictures = UInt8[np.ndarray, "t h w 3"]


def write_sample(
    folder: Path, sample: Sample, pictures: Pictures, *, kind: Kind, fps: float | int
) -> list[str]:
    """Write `<id>.png`, or the frames and the mp4 of a clip; each is complete under its name or not there.

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
    if _is_clip(place):  # of a run that was killed before it could note the sample
        shutil.rmtree(place)
    names = [f"{i:04d}.png" for i in range(len(pictures))]
    with atomic_directory(place) as temporary:
        for name, picture in zip(names, pictures, strict=True):
            media.write_png(temporary / name, picture)
    return [*(f"{sample.id}/{name}" for name in names), sample.video]


def frames_sha256(frames: Pictures) -> str:
    """Return the hash of the pixels, row by row; the same whatever the file format."""
    return hashlib.sha256(np.ascontiguousarray(frames).tobytes()).hexdigest()


def is_intact(folder: Path, record: dict[str, Any]) -> bool:
    """Return whether the files are there and hold the pixels of the record."""
    try:
        files = [folder / file for file in record["files"] if is_inside(file)]
        frames = [read_image(x) for x in files if is_picture(x)]
        if any(x.stat().st_size == 0 for x in files):
            return False
        return frames_sha256(np.stack(frames)) == record["sha256"]
    except (KeyError, TypeError, ValueError, OSError):
        return False


def check_free(folder: Path, own: Sequence[Sample], samples: Sequence[Sample], kind: Kind) -> None:
    """Check that no file of somebody else is in the way, in a folder that holds no earlier run.

    Args:
        own: samples of this rank.
        samples: samples of all ranks; another rank may have begun this very moment.

    Raises:
        ValueError: something is in the way.
    """
    for sample in own:
        for name in _places(sample, kind):
            if (folder / name).exists():
                raise ValueError(
                    f"output_dir={str(folder)!r}: already holds {name}; choose another or overwrite"
                )
    # A manifest would hide them from whoever opens the folder as the set that it was.
    planned = {name for sample in samples for name in _places(sample, kind)}
    for path in sorted(folder.iterdir()):
        strange = path.name not in planned and not path.name.startswith(".")
        if strange and is_picture(path):
            raise ValueError(
                f"output_dir={str(folder)!r}: holds pictures of another origin, such as {path.name}; choose "
                "another folder"
            )


def remove_old(
    folder: Path, found: Found, samples: Sequence[Sample], shards: Shards, kind: Kind
) -> None:
    """Remove the set that is replaced. Files where another rank writes are left to that rank."""
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
    """Return the names of the sample's files and folders."""
    return [f"{sample.id}.png"] if kind == "images" else [sample.id, sample.video]


def _is_clip(place: Path) -> bool:
    """Return whether a folder holds frames only, so that nobody's pictures are taken for a leftover."""
    return (
        place.is_dir()
        and not place.is_symlink()
        and all(x.suffix == ".png" and x.stem.isdigit() for x in place.iterdir())
    )
