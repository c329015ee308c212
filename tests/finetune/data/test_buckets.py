"""Buckets: parsing, rules of models, choice, resizing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dit_accel.finetune.data.buckets import (
    Bucket,
    SizeRules,
    fit,
    nearest_bucket,
    parse_buckets,
    to_pixels,
)

WAN, IMAGES = SizeRules(16, 4), SizeRules(16, 0)


def test_parsing():
    assert parse_buckets("33,64,96; 17, 96,64", WAN) == (Bucket(33, 64, 96), Bucket(17, 96, 64))
    assert parse_buckets("1,64,96", IMAGES) == (Bucket(1, 64, 96),)
    assert str(Bucket(33, 64, 96)) == "33x64x96"
    assert Bucket.parse("33x64x96") == Bucket(33, 64, 96)
    with pytest.raises(ValueError, match="bucket='33x64'"):
        Bucket.parse("33x64")


@pytest.mark.parametrize(
    ("text", "rules", "message"),
    [
        ("", WAN, "buckets='': ''"),
        ("64,96", WAN, "buckets='64,96': '64,96' .*frames,height,width"),
        ("33,64,96;", WAN, "buckets='33,64,96;': ''"),
        ("33,64,x", WAN, "'33,64,x' is not a bucket"),
        ("33,64,96,1", WAN, "'33,64,96,1' is not a bucket"),
        ("33,60,96", WAN, "height 60 of 33x60x96 .*16, such as 48 or 64"),
        ("33,64,0", WAN, "'33,64,0' is not a bucket"),
        ("32,64,96", WAN, r"frames 32 of 32x64x96 .*4k \+ 1, such as 29"),
        ("0,64,96", WAN, "'0,64,96' is not a bucket"),
        ("33,64,99999999", WAN, r"'33,64,99999999' .* in \[1, 65536\]"),
        ("5,64,96", IMAGES, "frames 5 of 5x64x96 must be 1"),
        ("33,64,96;33,64,96", WAN, "33x64x96 .*twice"),
    ],
)
def test_bad_buckets_are_refused(text, rules, message):
    with pytest.raises(ValueError, match=message) as found:
        parse_buckets(text, rules)
    assert str(found.value).startswith("buckets")


def test_the_largest_bucket_of_a_file():
    assert WAN.largest(20, 100, 64) == Bucket(17, 96, 64)
    assert WAN.largest(1, 16, 16) == Bucket(1, 16, 16)
    assert IMAGES.largest(20, 100, 64) == Bucket(1, 96, 64)
    assert WAN.largest(20, 15, 64) is None


LANDSCAPE, PORTRAIT, SQUARE = Bucket(33, 480, 832), Bucket(33, 832, 480), Bucket(33, 640, 640)
LARGE, LONG, STILL = Bucket(33, 720, 1280), Bucket(81, 480, 832), Bucket(1, 640, 640)


@pytest.mark.parametrize(
    ("size", "buckets", "expected"),
    [
        ((40, 1080, 1920), [PORTRAIT, LANDSCAPE, SQUARE], LANDSCAPE),
        ((40, 1920, 1080), [LANDSCAPE, SQUARE, PORTRAIT], PORTRAIT),
        ((40, 500, 480), [LANDSCAPE, PORTRAIT, SQUARE], SQUARE),
        ((40, 1080, 1920), [LANDSCAPE, LARGE], LARGE),
        ((40, 480, 832), [LANDSCAPE, LARGE], LANDSCAPE),
        ((40, 240, 416), [LANDSCAPE, LARGE], LANDSCAPE),
        ((90, 480, 832), [LANDSCAPE, LONG], LONG),
        ((80, 480, 832), [LANDSCAPE, LONG], LANDSCAPE),
        ((90, 832, 480), [LONG, PORTRAIT], PORTRAIT),
        ((80, 832, 480), [LONG, LANDSCAPE], LANDSCAPE),
        ((32, 480, 832), [LANDSCAPE, LONG], None),
        ((33, 640, 640), [LANDSCAPE, STILL], LANDSCAPE),
        ((1, 480, 832), [LANDSCAPE, STILL], STILL),
    ],
    ids=str,
)
def test_the_nearest_bucket(size, buckets, expected):
    assert nearest_bucket(*size, buckets) == expected
    assert nearest_bucket(*size, buckets[::-1]) == expected


@given(
    height=st.integers(16, 2000),
    width=st.integers(16, 2000),
    sides=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6, unique=True
    ),
)
def test_no_bucket_has_a_much_nearer_aspect_ratio(height, width, sides):
    buckets = [Bucket(1, 16 * a, 16 * b) for a, b in sides]
    chosen = nearest_bucket(1, height, width, buckets)

    def distance(bucket):
        return abs(np.log(bucket.height / bucket.width * width / height))

    assert distance(chosen) <= min(map(distance, buckets)) + np.log(1.05) + 1e-9


def test_a_picture_of_the_size_stays_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    assert fit(pixels, 32, 48) is pixels


def test_the_centre_is_cut_out():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    assert np.array_equal(fit(pixels, 32, 32), pixels[:, 8:40])
    assert np.array_equal(fit(pixels, 16, 48), pixels[8:24])


@pytest.mark.parametrize("size", [(16, 16), (48, 32), (16, 64)], ids=str)
def test_resizing_is_that_of_pillow(size):
    """Pillow's bicubic filter, with antialiasing, on the part that is shown."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 100, 3), np.uint8)
    scale = max(size[0] / 60, size[1] / 100)
    resized = (max(round(60 * scale), size[0]), max(round(100 * scale), size[1]))
    image = Image.fromarray(pixels).resize(resized[::-1], Image.Resampling.BICUBIC)
    top, left = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
    expected = np.asarray(image)[top : top + size[0], left : left + size[1]]
    assert np.abs(fit(pixels, *size).astype(int) - expected).max() <= 1


def test_fine_stripes_do_not_alias():
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    small = fit(stripes, 16, 16)
    assert np.abs(small.astype(int) - 127).max() <= 6


def test_odd_sources_fill_every_bucket():
    for height, width in ((47, 63), (1, 500), (333, 17)):
        assert fit(np.zeros((height, width, 3), np.uint8), 32, 48).shape == (32, 48, 3)


def test_pixels_are_in_minus_one_to_one():
    clip = np.array([0, 255, 51], np.uint8).reshape(1, 1, 1, 3).repeat(2, 0)
    pixels = to_pixels(clip)
    assert pixels.shape == (3, 2, 1, 1)
    assert torch.allclose(pixels[:, 0, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))
