"""Argument checks whose errors name the argument, its value and what is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .vocabulary import SPLITS


def check_count(name: str, value: Any, least: int = 1) -> None:
    """An integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def check_split(split: Any) -> None:
    """One of the splits' names."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(map(repr, SPLITS))}, got {split!r}")


def check_frame(num_frames: Any, height: Any, width: Any) -> None:
    """Any number of frames; sides large enough for a shape to be seen."""
    check_count("num_frames", num_frames)
    check_count("height", height, 16)
    check_count("width", width, 16)


def check_empty_dir(name: str, path: str | Path) -> Path:
    """The path, if nothing is there yet or an empty folder."""
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{name} must not exist yet or be an empty folder, but {str(folder)!r} is not empty"
        )
    return folder
