"""Prompts of a shipped prompt set or of a prompts file."""

import os
from pathlib import Path

from dit_accel.files import asset
from dit_accel.sampling.prompts import PromptRecord, read_prompts

SETS = {
    "smoke": "smoke.txt",
    "demo": "demo.jsonl",
    "demo-images": "demo_images.jsonl",
}
"""File of each shipped set. "smoke" has 16 varied prompts for any model. "demo" has prompts of the training data of tiny-wan,
"demo-images" those of the embedded image models."""


def load_prompts(source: str | os.PathLike, limit: int | None = None) -> list[PromptRecord]:
    """Return the prompt records of a shipped set or of a prompts file.

    Args:
        source: "smoke", "demo", "demo-images", or a path (see `dit_accel.sampling.prompts.read_prompts`).
        limit: maximum number of prompts. Default: all.

    Raises:
        ValueError: there is no such set or file, or the file is invalid.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: must be an int >= 1")
    if str(source) in SETS and not Path(source).is_file():
        path = _shipped(SETS[str(source)])
    elif not Path(source).is_file():
        raise ValueError(
            f"prompts={str(source)!r}: no such file; must be one of {', '.join(SETS)} or a prompts file"
        )
    else:
        path = Path(source)
    return read_prompts(path)[:limit]


def _shipped(name: str) -> Path:
    """Return the path of a shipped file: in eval/ of a checkout, or in the assets of an installed wheel."""
    checkout = Path(__file__).resolve().parents[2] / "eval" / name
    return checkout if checkout.is_file() else asset(f"prompts/{name}")
