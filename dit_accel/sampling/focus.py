"""`write_focus`: pictures of where region-adaptive sampling worked, how often each token ran, and when."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from dit_accel.runtime.components import transformers_of
from dit_accel.runtime.install import method_of
from dit_accel.runtime.summary import summarise
from dit_accel.sampling import media

COLUMNS = 4
SIDE = 256
"""Large pictures are thinned out to about this height in a focus picture."""
# Dark blue for rarely, over orange, to pale yellow for often.
_COLOURS = np.array([[13, 22, 66], [128, 37, 110], [222, 92, 60], [252, 190, 90], [252, 253, 191]])


def focus_masks(pipe: Any, sample: int = 0) -> dict[int, Bool[np.ndarray, "t h w"]]:
    """Return which tokens ran, in each step of the last run that left some out; empty if none did.

    Raises:
        ValueError: region-adaptive sampling is off.
    """
    parts = summarise(pipe)
    if not any("ras" in x.methods for x in parts.values()):
        raise ValueError("save_focus: region-adaptive sampling is off; accepted with ras=...")
    masks: dict[int, np.ndarray] = {}
    begin = 0
    for part, transformer in zip(parts.values(), transformers_of(pipe), strict=True):
        if part.steps and "ras" in part.methods:
            found = method_of(transformer, "ras").masks(sample)
            masks |= {begin + step: mask.numpy() for step, mask in found.items()}
        begin += part.steps
    return masks


def heat(values: Float[np.ndarray, "t h w"]) -> UInt8[np.ndarray, "t h w 3"]:
    """Return values in [0, 1] as colours."""
    place = np.clip(values, 0, 1) * (len(_COLOURS) - 1)
    low = np.minimum(place.astype(int), len(_COLOURS) - 2)
    share = (place - low)[..., None]
    return np.rint(_COLOURS[low] * (1 - share) + _COLOURS[low + 1] * share).astype(np.uint8)


def _stretch(
    cells: UInt8[np.ndarray, "t h w 3"], size: tuple[int, int, int]
) -> UInt8[np.ndarray, "t2 h2 w2 3"]:
    """Enlarge to the size of the clip (nearest neighbour)."""
    for axis, length in enumerate(size):
        index = np.arange(length) * cells.shape[axis] // length
        cells = np.take(cells, index, axis=axis)
    return cells


def write_focus(
    stem: Path,
    frames: UInt8[np.ndarray, "t h w 3"],
    masks: dict[int, np.ndarray],
    *,
    fps: int | float,
) -> list[Path]:
    """Write `stem-focus.png`: the result, how often each token ran, and who ran in some of the steps; of a
    video also `stem-focus.mp4`, the clip beside its heat map. Returns the files.

    Args:
        masks: see `focus_masks`; at least one.
    """
    every = max(1, min(frames.shape[1:3]) // SIDE)
    frames = frames[:, ::every, ::every]
    share = np.mean(list(masks.values()), axis=0)
    spread = max(share.max() - share.min(), 1e-6)
    colours = _stretch(heat((share - share.min()) / spread), frames.shape[:3])
    title = f"share of steps: {share.min():.2f} blue, {share.max():.2f} yellow"
    if share.max() == share.min():
        title = f"share of steps: {share.min():.2f} everywhere"
    cells = [
        (name if i == 0 else f"frame {i}", clip[i])
        for name, clip in (("result", frames), (title, colours))
        for i in _spread(len(frames), COLUMNS)
    ]
    steps = list(masks)
    middle = len(share) // 2
    for i in _spread(len(steps), 2 * COLUMNS - len(cells) % COLUMNS):
        who = heat(masks[steps[i]][middle : middle + 1].astype(float))
        where = "" if len(share) == 1 else ", middle frame"
        cells.append((f"ran in step {steps[i]}{where}", _stretch(who, (1, *frames.shape[1:3]))[0]))
    picture = stem.with_name(f"{stem.name}-focus.png")
    media.write_png(picture, _grid(cells))
    if len(frames) == 1:
        return [picture]
    video = stem.with_name(f"{stem.name}-focus.mp4")
    clips = [("result", frames), (title, colours)]
    media.write_video(video, media.side_by_side(clips), fps=fps)
    return [picture, video]


def _spread(length: int, count: int) -> list[int]:
    """Return at most `count` evenly spaced indices."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


def _grid(cells: list[tuple[str, np.ndarray]]) -> UInt8[np.ndarray, "h w 3"]:
    """Return titled pictures in rows of `COLUMNS`."""
    blank = ("", np.full_like(cells[0][1], media.BACKGROUND))
    cells = cells + [blank] * (-len(cells) % COLUMNS)
    rows = [cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)]
    return np.concatenate([media.side_by_side([(t, x[None]) for t, x in row])[0] for row in rows])
