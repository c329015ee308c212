"""Temporal flickering of a clip, as VBench defines it; needs no network."""

from itertools import pairwise

import numpy as np
from jaxtyping import UInt8


def flicker(frames: UInt8[np.ndarray, "t h w 3"]) -> float:
    """(255 - the mean absolute difference of neighbouring frames) / 255; 1 for a still clip.

    Raises:
        ValueError: a single frame.
    """
    if len(frames) < 2:
        raise ValueError("frames: 1 frame; accepted are at least 2")
    # Bytes wrap around when they are subtracted; pair by pair, because a clip can be long.
    steps = [np.abs(after.astype(np.int16) - before).mean() for before, after in pairwise(frames)]
    return float((255 - np.mean(steps)) / 255)
