"""Media that travel inside the page, as many samples as fit."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dit_accel.eval.results.types import MEDIA, Results, Sample

PAGE_BYTES = 64 * 2**20
"""Of media in one page, before base64 adds a third: browsers and mail programs still open it."""


@dataclass(frozen=True)
class Inlined:
    """Samples with their media as [MIME type, base64], by row name."""

    samples: list[dict]
    note: str
    """What was left out, or empty."""
    fps: float
    """Of the first clip."""


def inline_media(
    results: Results, folder: Path, samples: int, *, page_bytes: int = PAGE_BYTES
) -> Inlined:
    """Read the media of the first `samples` samples, while they fit into `page_bytes`.

    Raises:
        ValueError: a file that results.json names is not there.
    """
    shown = [sample for sample in results["samples"] if sample["media"]]
    chosen: list[Sample] = []
    size, full = 0, False
    for sample in shown[:samples]:
        more = sum(_file(folder, sample, name).stat().st_size for name in sample["media"])
        if size + more > page_bytes:
            full = True
            break
        size += more
        chosen.append(sample)
    note = ""
    if len(chosen) < len(shown):
        why = f"a page holds at most {page_bytes // 2**20} MiB of media" if full else ""
        note = f"{len(chosen)} of {len(shown)} samples are in this page" + (
            f" ({why})" if why else ""
        )
        note += "; the others are in the folders beside it."
    return Inlined(
        [
            {
                "id": sample["id"],
                "prompt": sample["prompt"],
                "media": {name: _encoded(_file(folder, sample, name)) for name in sample["media"]},
            }
            for sample in chosen
        ],
        note,
        _fps(folder, chosen),
    )


def _file(folder: Path, sample: Sample, name: str) -> Path:
    path = folder / sample["media"][name]
    if not path.is_file():
        raise ValueError(
            f"folder={str(folder)!r}: {sample['media'][name]!r} of sample {sample['id']!r} is not "
            "there; accepted is the folder as the evaluation wrote it"
        )
    return path


def _encoded(path: Path) -> list[str]:
    return [MEDIA[path.suffix.lower()], base64.b64encode(path.read_bytes()).decode("ascii")]


def _fps(folder: Path, samples: Sequence[Sample]) -> float:
    """The page steps by frames; without a clip there is nothing to step through."""
    for sample in samples:
        for name, file in sample["media"].items():
            if file.lower().endswith(".mp4"):
                import imageio.v3 as iio

                return float(iio.immeta(_file(folder, sample, name), plugin="FFMPEG")["fps"])
    return 16.0
