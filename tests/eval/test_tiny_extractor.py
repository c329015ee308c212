"""The shipped extractor sees what goes wrong in the demo's pictures, more of it the more goes wrong."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dit_accel.bench.train_extractor import drawing_batch, save_half, train_extractor
from dit_accel.demo.tiny_extractor import ASSET, FEATURES, SIZE
from dit_accel.eval.metrics.distances import FeatureSet, frechet_distance
from dit_accel.eval.metrics.features import tiny_extractor
from dit_accel.files import asset

COUNT = 300


@pytest.fixture(scope="module")
def extractor():
    return tiny_extractor()


@pytest.fixture(scope="module")
def distance(extractor, stills):
    """Return the distance of changed pictures to other pictures of the demo."""

    def features(images):
        out = FeatureSet(extractor.record, FEATURES, keep=0)
        for i in range(0, len(images), 100):
            batch = [extractor.prepare(x) for x in images[i : i + 100]]
            out.add(extractor(batch), [str(i + j) for j in range(len(batch))])
        return out

    images, reference = stills(COUNT, 1)[0], features(stills(COUNT, 2)[0])
    return lambda change: frechet_distance(features(change(images)), reference)


def blurred(images, sigma):
    taps = torch.exp(-0.5 * (torch.arange(-9.0, 10.0) / sigma) ** 2)
    kernel = (taps[:, None] * taps / taps.sum() ** 2).expand(3, 1, -1, -1)
    x = F.pad(torch.from_numpy(images).permute(0, 3, 1, 2).float(), (9,) * 4, "replicate")
    return F.conv2d(x, kernel, groups=3).round().byte().permute(0, 2, 3, 1).numpy()


def noisy(images, sigma):
    noise = np.random.default_rng(0).normal(0, sigma * 255, images.shape)
    return (images + noise).round().clip(0, 255).astype(np.uint8)


def tinted(images, share):
    return ((1 - share) * images + share * np.array([250, 120, 30])).round().astype(np.uint8)


def of_one_shape(images, share, stills):
    """A share of the pictures replaced by circles."""
    from dit_accel.demo.clips import STILL, describe_clips, render_stills

    chosen = [(0, i % 8, i % 6) for i in range(int(share * len(images)))]
    described = describe_clips(chosen, torch.Generator().manual_seed(5), STILL)
    circles = ((render_stills(described) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return np.concatenate([circles, images[len(circles) :]])


CHANGES = {
    "blur": (blurred, (0.7, 1.2, 2.0)),
    "noise": (noisy, (0.03, 0.08, 0.15)),
    "colour": (tinted, (0.1, 0.2, 0.35)),
    "place": (lambda images, pixels: np.roll(images, pixels, 2), (3, 7, 12)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_distance_grows_with(name, distance):
    change, amounts = CHANGES[name]
    values = [distance(lambda x: x), *(distance(lambda x, a=a: change(x, a)) for a in amounts)]
    assert values == sorted(values)
    assert values[1] > 1.3 * values[0]
    assert values[-1] > 4 * values[0]


def test_distance_grows_with_missing_shapes(distance, stills):
    values = [distance(lambda x, s=s: of_one_shape(x, s, stills)) for s in (0, 0.3, 0.6, 1.0)]
    assert values == sorted(values)
    assert values[-1] > 5 * values[0]


def test_features_are_uncorrelated_on_what_they_were_trained_on(extractor):
    images = drawing_batch(1000, torch.Generator().manual_seed(7))[0]
    features = extractor.module(images)
    assert features.mean(0).abs().max() < 0.2
    covariance = torch.cov(features.mT)
    assert 0.8 < covariance.diagonal().max() < 1.4
    assert (covariance - covariance.diag().diag()).abs().max() < 0.2


def test_training_batches_are_blurred_and_noisy_by_what_they_say():
    images, shapes, measures = drawing_batch(64, torch.Generator().manual_seed(0))
    assert images.shape == (64, 3, SIZE, SIZE)
    assert (images.min(), images.max()) == (0, 1)
    assert set(shapes.tolist()) == {0, 1, 2, 3}
    corner = images[:, :, :6, :6].std((2, 3)).amax(1)  # nothing but background is there
    blur, noise = measures[:, -2], measures[:, -1]
    assert corner[noise == -1].max() < 1e-6 < corner[noise > 0].min()
    sharpest = images.diff(dim=3).abs().amax((1, 2, 3))
    clean = noise == -1
    assert sharpest[clean & (blur > 1)].mean() < 0.7 * sharpest[clean & (blur == -1)].mean()


def test_training_is_repeatable_and_small(tmp_path):
    a, b = (train_extractor(steps=3, batch_size=8, progress=False) for _ in range(2))
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)
    save_half(a, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size < 1_000_000
    assert asset(ASSET).stat().st_size < 1_000_000
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    loaded = tiny_extractor(tmp_path / "a.safetensors")
    expected = a(torch.zeros(1, 3, SIZE, SIZE))
    torch.testing.assert_close(loaded([loaded.prepare(image)]), expected, rtol=2e-2, atol=2e-2)
