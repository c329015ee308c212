"""Pictures of where region-adaptive sampling worked: how often each token ran, and when."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from dit_accel import control, media

# Dark blue for rarely, over orange, to pale yellow for in every step.
_COLOURS = np.array([[13, 22, 66], [128, 37, 110], [222, 92, 60], [252, 190, 90], [252, 253, 191]])


def focus_masks(pipe: Any, sample: int = 0) -> list[Bool[np.ndarray, "t h w"]]:
    """Which tokens ran in each step of the last run that left some out; empty if none did.

    Raises:
        ValueError: region-adaptive sampling is off.
    """
    session = control.session_of(pipe)
    if session is None or session.ras is None:
        raise ValueError("save_focus: region-adaptive sampling is off; accepted with ras=...")
    return [mask.numpy() for mask in session.ras.focus(sample) if mask is not None]


def heat(values: Float[np.ndarray, "t h w"]) -> UInt8[np.ndarray, "t h w 3"]:
    """Values in [0, 1] as colours."""
    place = np.clip(values, 0, 1) * (len(_COLOURS) - 1)
    low = np.minimum(place.astype(int), len(_COLOURS) - 2)
    share = (place - low)[..., None]
    return np.rint(_COLOURS[low] * (1 - share) + _COLOURS[low + 1] * share).astype(np.uint8)


def _stretch(
    cells: UInt8[np.ndarray, "t h w 3"], size: tuple[int, int, int]
) -> UInt8[np.ndarray, "t2 h2 w2 3"]:
    """Nearest neighbour, to the size of the clip."""
    for axis, length in enumerate(size):
        index = np.arange(length) * cells.shape[axis] // length
        cells = np.take(cells, index, axis=axis)
    return cells


def write_focus(
    stem: Path, frames: UInt8[np.ndarray, "t h w 3"], masks: list[np.ndarray], *, fps: int | float
) -> list[Path]:
    """`stem-focus.png`: the clip, how often each token ran, and the masks of single steps; of a video
    also `stem-focus.mp4`, the clip beside its heat map. Returns the files."""
    share = np.mean(masks, axis=0)
    spread = max(share.max() - share.min(), 1e-6)
    size = frames.shape[:3]
    colours = _stretch(heat(((share - share.min()) / spread).astype(np.float64)), size)
    title = f"share of the {len(masks)} region-adaptive steps: {share.min():.2f} (blue) to {share.max():.2f} (yellow)"
    rows = [("result", frames), (title, colours)]
    middle = size[0] // 2
    steps = [_stretch(heat(mask.astype(np.float64)), size)[middle] for mask in masks]
    rows.append(
        ("who ran, step by step" + (" (middle frame)" if size[0] > 1 else ""), np.stack(steps))
    )
    columns = 8 if size[0] > 1 or len(steps) > 1 else 1
    picture = stem.with_name(f"{stem.name}-focus.png")
    media.write_png(picture, media.contact_sheet(_same_width(rows, columns), columns=columns))
    if size[0] == 1:
        return [picture]
    video = stem.with_name(f"{stem.name}-focus.mp4")
    media.write_video(video, media.side_by_side(rows[:2]), fps=fps)
    return [picture, video]


def _same_width(
    rows: list[tuple[str, np.ndarray]], columns: int
) -> list[tuple[str, UInt8[np.ndarray, "n h w 3"]]]:
    """Rows of exactly `columns` pictures: evenly spaced ones, or black ones behind the last."""
    full = []
    for title, frames in rows:
        chosen = np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)
        blank = np.zeros((columns - len(chosen), *frames.shape[1:]), np.uint8)
        full.append((title, np.concatenate([frames[chosen], blank])))
    return full
