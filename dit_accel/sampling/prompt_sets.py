"""`load_prompts`: prompts of a shipped set or of any prompts file."""

import os
from pathlib import Path

from dit_accel.files import asset
from dit_accel.sampling.prompts import PromptRecord, read_prompts

SETS = {
    "smoke": "smoke.txt",
    "demo": "demo.jsonl",
    "demo-images": "demo_images.jsonl",
}
"""By name: 16 varied prompts for any model; what tiny-wan ("demo") and the embedded image models
("demo-images") were trained on."""


def load_prompts(source: str | os.PathLike, limit: int | None = None) -> list[PromptRecord]:
    """Return the records of a shipped set or of a prompts file; of its first `limit` prompts.

    Args:
        source: "smoke", "demo", "demo-images", or a path (see `dit_accel.sampling.prompts.read_prompts`).

    Raises:
        ValueError: no such set or file, or a bad one.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: accepted is an int >= 1")
    if str(source) in SETS and not Path(source).is_file():
        path = _shipped(SETS[str(source)])
    elif not Path(source).is_file():
        raise ValueError(
            f"prompts={str(source)!r}: no such file; accepted are {', '.join(SETS)} or a prompts file"
        )
    else:
        path = Path(source)
    return read_prompts(path)[:limit]


def _shipped(name: str) -> Path:
    """Return the path of a set: in eval/ of a checkout, among the assets of a wheel."""
    checkout = Path(__file__).resolve().parents[2] / "eval" / name
    return checkout if checkout.is_file() else asset(f"prompts/{name}")
