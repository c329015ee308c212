"""Resizing, extractors of any module, and the shipped one."""

import numpy as np
import pytest
import torch
from torch import nn

from dit_accel.eval.metrics.features import Extractor, resized, tiny_extractor

SIZES = [((40, 56), (64, 64)), ((200, 150), (64, 72)), ((64, 64), (64, 64))]


def picture(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


class Means(nn.Module):
    """Three features: the mean of each channel."""

    def forward(self, x):
        return x.mean((2, 3))


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_tf_legacy_is_the_bilinear_of_its_definition(old, new):
    """Pixel i is read at i · (old / new), between its two neighbours, without antialiasing: in numpy."""
    pytest.importorskip("torch_fidelity")

    def weights(length, wanted):
        place = np.arange(wanted) * length / wanted
        low = place.astype(int)
        out = np.zeros((wanted, length))
        np.add.at(out, (range(wanted), low), 1 - (place - low))
        np.add.at(out, (range(wanted), np.minimum(low + 1, length - 1)), place - low)
        return out

    image = picture(old)
    rows, columns = weights(old[0], new[0]), weights(old[1], new[1])
    expected = np.einsum("yh,hwc,xw->cyx", rows, image.astype(float), columns)
    found = resized(image, new, "tf-legacy").numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=4e-3)  # places are float32


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_clean_is_the_bicubic_of_its_definition(old, new):
    """Cubic kernel (a = -1/2), widened when the picture shrinks, edges renormalised: in numpy."""

    def weights(length, wanted):
        scale = max(1.0, length / wanted)
        centres = (np.arange(wanted) + 0.5) * length / wanted
        distance = np.abs(np.arange(length) + 0.5 - centres[:, None]) / scale
        near = 1.5 * distance**3 - 2.5 * distance**2 + 1
        far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
        kernel = np.where(distance < 1, near, np.where(distance < 2, far, 0))
        return kernel / kernel.sum(1, keepdims=True)

    image = picture(old)
    rows, columns = weights(old[0], new[0]), weights(old[1], new[1])
    expected = np.einsum("yh,hwc,xw->cyx", rows, image.astype(float), columns).clip(0, 255)
    found = resized(image, new, "clean").numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("how", ["clean", "tf-legacy", "torch-antialias"])
def test_the_same_size_is_the_same_picture(how):
    image = picture((32, 48))
    assert np.array_equal(resized(image, (32, 48), how).numpy(), image.transpose(2, 0, 1))


def test_ways_of_resizing_differ():
    pytest.importorskip("torch_fidelity")
    image = picture((200, 200))
    a, b, c = (resized(image, (64, 64), x) for x in ("clean", "tf-legacy", "torch-antialias"))
    assert (a - b).abs().mean() > 1
    assert (a - c).abs().mean() > 1


def test_any_module_gives_features():
    extractor = Extractor(Means(), name="means")
    image = picture((10, 20))
    (features,) = extractor([extractor.prepare(image)])
    np.testing.assert_allclose(features, image.mean((0, 1)) / 255, rtol=1e-5)


def test_record_tells_networks_and_resizing_apart():
    torch.manual_seed(0)
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    records = [Extractor(x, name="linear").record for x in (one, other, one)]
    assert records[0] == records[2] != records[1]
    assert records[0]["resize"] is None
    sized = Extractor(one, name="linear", size=8, resize="torch-antialias").record
    assert sized["resize"] == "torch-antialias"


def test_pictures_of_mixed_sizes_need_a_size():
    fixed = Extractor(Means(), name="means")
    fixed.prepare(picture((10, 20)))
    with pytest.raises(ValueError, match=r"10x10.*20x10.*'means'"):
        fixed.prepare(picture((10, 10)))
    sized = Extractor(Means(), name="means", size=(16, 24))
    shapes = {tuple(sized.prepare(picture(x)).shape) for x in ((10, 20), (30, 9))}
    assert shapes == {(3, 16, 24)}


@pytest.mark.parametrize("out", [torch.zeros(2, 3, 4), torch.zeros(5, 3), "no"], ids=str)
def test_modules_that_return_no_features_are_refused(out):
    class Wrong(nn.Module):
        def forward(self, x):
            return out

    extractor = Extractor(Wrong(), name="wrong")
    with pytest.raises(ValueError, match=r"'wrong'.*\[2, features\]"):
        extractor([torch.zeros(3, 8, 8)] * 2)


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"resize='nearest'.*clean, tf-legacy"):
        Extractor(Means(), name="means", resize="nearest")


def test_tiny_extractor_is_small_and_named():
    extractor = tiny_extractor()
    record = extractor.record
    assert record["id"] == "dit-accel-tiny:64"
    assert record["resize"] == "clean"
    features = extractor([extractor.prepare(picture((100, 80)))])
    assert features.shape == (1, 64)


def test_other_weights_are_no_tiny_extractor(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"path=.*weights.safetensors.*tiny"):
        tiny_extractor(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"path=.*weights.safetensors"):
        tiny_extractor(path)
    with pytest.raises(ValueError, match=r"path=.*none.safetensors"):
        tiny_extractor(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"size": (8, 0)}, r"size=\(8, 0\)"),
        ({"name": "a b"}, "name='a b'"),
    ],
)
def test_bad_extractors_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Extractor(**{"module": torch.nn.Flatten(), "name": "flat"} | arguments)
