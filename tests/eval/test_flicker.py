"""Temporal flickering against its definition."""

import numpy as np
import pytest

from dit_accel.eval.metrics.flicker import flicker


def test_flicker_is_the_mean_absolute_difference(rng):
    frames = rng.integers(0, 256, (5, 12, 10, 3), dtype=np.uint8)
    differences = np.abs(np.diff(frames.astype(float), axis=0))
    assert flicker(frames) == pytest.approx((255 - differences.mean()) / 255, rel=1e-9)


def test_a_still_clip_does_not_flicker():
    assert flicker(np.full((4, 8, 8, 3), 77, np.uint8)) == 1


def test_black_and_white_in_turn_is_the_worst():
    frames = np.zeros((4, 8, 8, 3), np.uint8)
    frames[1::2] = 255
    assert flicker(frames) == 0


def test_a_single_frame_is_refused():
    with pytest.raises(ValueError, match="1 frame; accepted are at least 2"):
        flicker(np.zeros((1, 8, 8, 3), np.uint8))
