"""manifest.json of a sample set: reading and checking it, and comparing settings."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from dit_accel.sampling.image_files import IMAGE_SUFFIXES, is_image_file, is_unread_image_file

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
JOURNAL = "manifest.rank{}.jsonl"
"""Name of the journal of a rank: one line per finished sample, merged into MANIFEST at the end."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the content of manifest.json. The files that it lists are not checked.

    Raises:
        ValueError: the file is damaged or has another format version.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version={version!r}; must be {FORMAT_VERSION}")
    if manifest.get("kind") not in ("images", "clips"):
        raise ValueError(f"{path}: kind={manifest.get('kind')!r}; must be images or clips")
    samples = manifest.get("samples")
    if not isinstance(samples, dict) or not samples:
        raise ValueError(f"{path}: samples={samples!r}; must have at least one sample")
    for name, sample in samples.items():
        files = sample.get("files") if isinstance(sample, dict) else None
        if not isinstance(files, list) or not all(isinstance(x, str) for x in files):
            raise ValueError(f"{path}: sample {name!r} has no list of files")
    return manifest


def listed_frames(folder: Path, name: str, sample: dict[str, Any]) -> tuple[Path, ...]:
    """Return the paths of the frames that the manifest lists for a sample.

    Raises:
        ValueError: there are none, or a file is missing, outside the folder or in a format that is not read.
    """
    for file in sample["files"]:
        if not is_inside(file):
            raise ValueError(
                f"{folder / MANIFEST}: file {file!r} of {name!r} is outside the folder"
            )
        if is_unread_image_file(Path(file)):
            raise ValueError(
                f"{folder / MANIFEST}: file {file!r} of {name!r}; must be one of {', '.join(IMAGE_SUFFIXES)}"
            )
    frames = [folder / x for x in sample["files"] if is_image_file(Path(x))]
    if not frames:
        raise ValueError(f"{folder / MANIFEST}: sample {name!r} has no frames")
    for frame in frames:
        if not frame.is_file():
            raise ValueError(f"{frame}: listed in {MANIFEST} but missing; run generation again")
    return tuple(frames)


def is_inside(file: str) -> bool:
    """Return whether a path of a manifest stays inside the folder."""
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in file and file != ""


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return one sentence for each value that differs between two settings."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif key == "prompts_sha256" and a != b:
            found.append("the prompts differ")
        elif a != b:
            found.append(f"{prefix}{key} was {_short(a)} and is {_short(b)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
