"""PSNR, SSIM, LPIPS and flicker against their definitions and against other implementations."""

import math

import numpy as np
import pytest
import torch

from dit_accel.eval.metrics.pairs import LPIPS_BACKBONES, Lpips, flicker, psnr, ssim


@pytest.fixture
def clip():
    return np.random.default_rng(0).random((3, 32, 40, 3), dtype=np.float32)


@pytest.fixture
def noisy(clip):
    noise = np.random.default_rng(1).normal(0, 0.1, clip.shape)
    return np.clip(clip + noise, 0, 1).astype(np.float32)


def to_bytes(frames):
    return (frames * 255).round().astype(np.uint8)


def test_psnr_is_the_mean_squared_error_in_db(clip, noisy):
    error = np.mean((clip.astype(np.float64) - noisy) ** 2)
    assert psnr(clip, noisy) == pytest.approx(-10 * math.log10(error), rel=1e-6)


def test_psnr_is_that_of_scikit_image(clip, noisy):
    from skimage.metrics import peak_signal_noise_ratio

    a, b = to_bytes(clip), to_bytes(noisy)
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), rel=1e-5)


def test_bytes_do_not_wrap_around():
    a = np.full((1, 8, 8, 3), 10, np.uint8)
    b = np.full((1, 8, 8, 3), 250, np.uint8)  # 10 - 250 is 16 in bytes
    assert psnr(a, b) == pytest.approx(20 * math.log10(255 / 240), rel=1e-6)


def test_equal_clips_are_infinitely_close(clip):
    assert psnr(clip, clip) == math.inf
    assert ssim(clip, clip) == pytest.approx(1.0)


def test_ssim_is_that_of_scikit_image(clip, noisy):
    """Theirs leaves out a border of half the window; a reflected one makes it the whole picture."""
    from skimage.metrics import structural_similarity

    theirs = []
    for a, b in zip(to_bytes(clip), to_bytes(noisy), strict=True):
        a, b = (np.pad(x / 255.0, ((5, 5), (5, 5), (0, 0)), mode="reflect") for x in (a, b))
        theirs.append(
            structural_similarity(
                a,
                b,
                data_range=1.0,
                channel_axis=2,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
            )
        )
    assert ssim(to_bytes(clip), to_bytes(noisy)) == pytest.approx(np.mean(theirs), rel=1e-5)


def test_ssim_falls_with_noise(clip):
    rng = np.random.default_rng(2)
    a, b = (
        ssim(clip, np.clip(clip + rng.normal(0, s, clip.shape), 0, 1).astype(np.float32))
        for s in (0.05, 0.3)
    )
    assert 1 > a > b


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("metric", [psnr, ssim])
def test_clips_of_different_shape_are_refused(metric, clip):
    with pytest.raises(ValueError, match=r"3 frames.*2 frames"):
        metric(clip, clip[:2])
    with pytest.raises(ValueError, match=r"float32.*uint8"):
        metric(clip, to_bytes(clip))


def test_frames_below_the_window_are_refused():
    tiny = np.zeros((1, 5, 20, 3), np.uint8)
    with pytest.raises(ValueError, match=r"20x5.*6x6"):
        ssim(tiny, tiny)


@pytest.fixture(scope="module")
def lpips(alexnet):
    return Lpips(alexnet, allow_other_weights=True)


@pytest.fixture
def pictures(rng):
    a = rng.integers(0, 256, (2, 64, 72, 3), dtype=np.uint8)
    return a, (a * 0.7 + 30).astype(np.uint8)


def test_lpips_is_that_of_torchmetrics(lpips, alexnet, pictures):
    from torchmetrics.functional.image.lpips import _LPIPS

    theirs = _LPIPS(net="alex", pnet_rand=True).eval()
    state = torch.load(alexnet, weights_only=True)
    names = {k: f"features.{k.split('.', 1)[1]}" for k in theirs.net.state_dict()}
    theirs.net.load_state_dict({k: state[name] for k, name in names.items()})
    a, b = (torch.from_numpy(x).permute(0, 3, 1, 2) / 255.0 for x in pictures)
    with torch.no_grad():
        value = theirs(a, b, normalize=True).mean().item()
    assert value > 1e-4
    assert lpips(*pictures) == pytest.approx(value, rel=1e-5)


def test_lpips_of_equal_clips_is_zero(lpips, pictures):
    assert lpips(pictures[0], pictures[0]) == 0


def test_lpips_names_its_backbone(lpips):
    assert lpips.record["id"] == "lpips-alex-v0.1"
    assert len(lpips.record["sha256"]) == 64


def test_unknown_backbone_weights_are_refused(alexnet):
    with pytest.raises(ValueError, match=LPIPS_BACKBONES["alex"]):
        Lpips(alexnet)


def test_weights_of_another_backbone_are_refused(alexnet):
    with pytest.raises(ValueError, match=r"lpips=.*alexnet.*squeeze"):
        Lpips(alexnet, net="squeeze", allow_other_weights=True)
    with pytest.raises(ValueError, match="net='resnet'"):
        Lpips(alexnet, net="resnet")


def test_pictures_too_small_for_the_backbone_are_refused(lpips):
    small = np.zeros((1, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match=r"16x16.*LPIPS"):
        lpips(small, small)


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
