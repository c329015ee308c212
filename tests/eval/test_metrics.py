"""PSNR and SSIM against their definitions."""

import math

import numpy as np
import pytest

from dit_accel.eval.metrics import psnr, ssim


@pytest.fixture
def clip():
    return np.random.default_rng(0).random((3, 32, 40, 3), dtype=np.float32)


def test_psnr_is_the_mean_squared_error_in_db(clip):
    other = np.clip(clip + np.random.default_rng(1).normal(0, 0.1, clip.shape), 0, 1).astype(
        np.float32
    )
    error = np.mean((clip.astype(np.float64) - other) ** 2)
    assert psnr(clip, other) == pytest.approx(-10 * math.log10(error), rel=1e-6)


def test_equal_clips_are_infinitely_close(clip):
    assert psnr(clip, clip) == math.inf
    assert ssim(clip, clip) == pytest.approx(1.0)


def test_ssim_falls_with_noise(clip):
    rng = np.random.default_rng(2)
    a, b = (
        ssim(clip, np.clip(clip + rng.normal(0, s, clip.shape), 0, 1).astype(np.float32))
        for s in (0.05, 0.3)
    )
    assert 1 > a > b
