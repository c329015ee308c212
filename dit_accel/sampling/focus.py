"""Images and clips that show which tokens region-adaptive sampling ran in each step."""

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
"""Approximate side in pixels to which large frames are subsampled."""
# From dark blue (few steps) over orange to pale yellow (many steps).
_COLOURS = np.array([[13, 22, 66], [128, 37, 110], [222, 92, 60], [252, 190, 90], [252, 253, 191]])


def focus_masks(pipe: Any, sample: int = 0) -> dict[int, Bool[np.ndarray, "t h w"]]:
    """Return the masks of the tokens that ran in each partial step of the last run.

    Args:
        pipe: a pipeline with region-adaptive sampling, after a run.
        sample: index of the sample in the batch.

    Returns:
        Masks by step. Empty if the run had no partial steps.

    Raises:
        ValueError: region-adaptive sampling is off.
    """
    parts = summarise(pipe)
    if not any("ras" in x.methods for x in parts.values()):
        raise ValueError("save_focus=True: region-adaptive sampling is off; enable it with ras=...")
    masks: dict[int, np.ndarray] = {}
    begin = 0
    for part, transformer in zip(parts.values(), transformers_of(pipe), strict=True):
        if part.steps and "ras" in part.methods:
            found = method_of(transformer, "ras").masks(sample)
            masks |= {begin + step: mask.numpy() for step, mask in found.items()}
        begin += part.steps
    return masks


def heat(values: Float[np.ndarray, "t h w"]) -> UInt8[np.ndarray, "t h w 3"]:
    """Map values in [0, 1] to colours."""
    place = np.clip(values, 0, 1) * (len(_COLOURS) - 1)
    low = np.minimum(place.astype(int), len(_COLOURS) - 2)
    share = (place - low)[..., None]
    return np.rint(_COLOURS[low] * (1 - share) + _COLOURS[low + 1] * share).astype(np.uint8)


def _stretch(
    cells: UInt8[np.ndarray, "t h w 3"], size: tuple[int, int, int]
) -> UInt8[np.ndarray, "t2 h2 w2 3"]:
    """Resize to the frames, height and width of `size` by nearest neighbour."""
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
    """Write `stem-focus.png`, and `stem-focus.mp4` for a clip.

    The image shows the result, the share of steps in which each token ran, and the masks of some steps. The clip shows
    the result beside that share.

    Args:
        stem: path of the files without suffix.
        frames: the generated frames.
        masks: masks by step (see `focus_masks`), at least one.
        fps: frame rate of the clip.

    Returns:
        The paths of the files.
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
    """Return at most `count` evenly spaced indices below `length`."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


def _grid(cells: list[tuple[str, np.ndarray]]) -> UInt8[np.ndarray, "h w 3"]:
    """Arrange titled images in rows of `COLUMNS`."""
    blank = ("", np.full_like(cells[0][1], media.BACKGROUND))
    cells = cells + [blank] * (-len(cells) % COLUMNS)
    rows = [cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)]
    return np.concatenate([media.side_by_side([(t, x[None]) for t, x in row])[0] for row in rows])
